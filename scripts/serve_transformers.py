"""python -m scripts.serve_transformers: the command in nanochat_hf/cli/serve_transformers.py."""

from nanochat_hf.cli.serve_transformers import main

if __name__ == "__main__":
    main()
