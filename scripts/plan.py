"""python -m scripts.plan: the command in nanochat_hf/cli/plan.py."""

from nanochat_hf.cli.plan import main

if __name__ == "__main__":
    main()
