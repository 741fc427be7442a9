from nanochat_hf.cli.tok_eval import main

if __name__ == "__main__":
    main()
