from nanochat_hf.cli.pictures import main

if __name__ == "__main__":
    main()
