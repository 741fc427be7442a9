from nanochat_hf.cli.tok_train import main

if __name__ == "__main__":
    main()
