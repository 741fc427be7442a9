from nanochat_hf.cli.records import main

if __name__ == "__main__":
    main()
