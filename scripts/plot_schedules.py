"""python -m scripts.plot_schedules: the command in nanochat_hf/cli/plot_schedules.py."""

from nanochat_hf.cli.plot_schedules import main

if __name__ == "__main__":
    main()
