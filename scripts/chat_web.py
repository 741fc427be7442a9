from nanochat_hf.cli.chat_web import main

if __name__ == "__main__":
    main()
