"""python -m scripts.chat_eval: the command in nanochat_hf/cli/chat_eval.py."""

from nanochat_hf.cli.chat_eval import main

if __name__ == "__main__":
    main()
