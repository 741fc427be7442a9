from nanochat_hf.cli.push_dataset import main

if __name__ == "__main__":
    main()
