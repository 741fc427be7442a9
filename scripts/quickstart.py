"""python -m scripts.quickstart: the command in nanochat_hf/cli/quickstart.py."""

from nanochat_hf.cli.quickstart import main

if __name__ == "__main__":
    main()
