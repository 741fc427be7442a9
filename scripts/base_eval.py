"""python -m scripts.base_eval: the command in nanochat_hf/cli/base_eval.py."""

from nanochat_hf.cli.base_eval import main

if __name__ == "__main__":
    main()
