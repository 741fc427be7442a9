from nanochat_hf.cli.quickstart import main

if __name__ == "__main__":
    main()
