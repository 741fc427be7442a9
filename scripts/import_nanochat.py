from nanochat_hf.cli.import_nanochat import main

if __name__ == "__main__":
    main()
