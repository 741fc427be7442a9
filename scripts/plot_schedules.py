from nanochat_hf.cli.plot_schedules import main

if __name__ == "__main__":
    main()
