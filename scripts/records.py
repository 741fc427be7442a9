"""python -m scripts.records: the command in nanochat_hf/cli/records.py."""

from nanochat_hf.cli.records import main

if __name__ == "__main__":
    main()
