"""python -m scripts.push_dataset: the command in nanochat_hf/cli/push_dataset.py."""

from nanochat_hf.cli.push_dataset import main

if __name__ == "__main__":
    main()
