from nanochat_hf.cli.plan import main

if __name__ == "__main__":
    main()
