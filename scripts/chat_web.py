"""python -m scripts.chat_web: the command in nanochat_hf/cli/chat_web.py."""

from nanochat_hf.cli.chat_web import main

if __name__ == "__main__":
    main()
