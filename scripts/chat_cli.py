"""python -m scripts.chat_cli: the command in nanochat_hf/cli/chat_cli.py."""

from nanochat_hf.cli.chat_cli import main

if __name__ == "__main__":
    main()
