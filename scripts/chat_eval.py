from nanochat_hf.cli.chat_eval import main

if __name__ == "__main__":
    main()
