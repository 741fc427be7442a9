"""python -m scripts.chat_sft: the command in nanochat_hf/cli/chat_sft.py."""

from nanochat_hf.cli.chat_sft import main

if __name__ == "__main__":
    main()
