"""python -m scripts.show_data: the command in nanochat_hf/cli/show_data.py."""

from nanochat_hf.cli.show_data import main

if __name__ == "__main__":
    main()
