"""python -m scripts.chat_rl: the command in nanochat_hf/cli/chat_rl.py."""

from nanochat_hf.cli.chat_rl import main

if __name__ == "__main__":
    main()
