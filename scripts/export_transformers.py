"""python -m scripts.export_transformers: the command in nanochat_hf/cli/export_transformers.py."""

from nanochat_hf.cli.export_transformers import main

if __name__ == "__main__":
    main()
