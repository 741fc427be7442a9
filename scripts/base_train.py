from nanochat_hf.cli.base_train import main

if __name__ == "__main__":
    main()
