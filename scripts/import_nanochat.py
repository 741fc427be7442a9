"""python -m scripts.import_nanochat: the command in nanochat_hf/cli/import_nanochat.py."""

from nanochat_hf.cli.import_nanochat import main

if __name__ == "__main__":
    main()
