from nanochat_hf.cli.chat_cli import main

if __name__ == "__main__":
    main()
