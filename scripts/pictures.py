"""python -m scripts.pictures: the command in nanochat_hf/cli/pictures.py."""

from nanochat_hf.cli.pictures import main

if __name__ == "__main__":
    main()
