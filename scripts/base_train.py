"""python -m scripts.base_train: the command in nanochat_hf/cli/base_train.py."""

from nanochat_hf.cli.base_train import main

if __name__ == "__main__":
    main()
