"""python -m scripts.push_to_hub: the command in nanochat_hf/cli/push_to_hub.py."""

from nanochat_hf.cli.push_to_hub import main

if __name__ == "__main__":
    main()
