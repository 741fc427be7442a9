from nanochat_hf.cli.base_eval import main

if __name__ == "__main__":
    main()
