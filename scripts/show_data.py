from nanochat_hf.cli.show_data import main

if __name__ == "__main__":
    main()
