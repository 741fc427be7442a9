from nanochat_hf.cli.chat_sft import main

if __name__ == "__main__":
    main()
