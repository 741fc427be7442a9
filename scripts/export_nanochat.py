"""python -m scripts.export_nanochat: the command in nanochat_hf/cli/export_nanochat.py."""

from nanochat_hf.cli.export_nanochat import main

if __name__ == "__main__":
    main()
