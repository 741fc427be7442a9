"""python -m scripts.tok_train: the command in nanochat_hf/cli/tok_train.py."""

from nanochat_hf.cli.tok_train import main

if __name__ == "__main__":
    main()
