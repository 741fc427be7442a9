"""python -m scripts.tok_eval: the command in nanochat_hf/cli/tok_eval.py."""

from nanochat_hf.cli.tok_eval import main

if __name__ == "__main__":
    main()
