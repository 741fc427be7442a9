from nanochat_hf.cli.export_nanochat import main

if __name__ == "__main__":
    main()
