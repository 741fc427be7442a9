"""Serve a model over transformers' own OpenAI-compatible server: python -m scripts.serve MODEL [flags of `transformers serve`]

`transformers serve` looks for a model's class by name among transformers' own (read in 5.23), so it is told of ours before it starts; all
else is transformers'. Needs its extra: pip install 'transformers[serving]'. The calculator does not run there: that is the Engine's work.
"""

import importlib
import sys

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.config import user_errors


@user_errors
def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        import fastapi  # noqa: F401  the server asks for these only when a model is already loaded
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"the server needs {error.name}, which is not installed; pip install 'transformers[serving]'") from None
    from transformers.cli.transformers import app

    # by name, for transformers puts another module in its own place while it is imported
    setattr(importlib.import_module("transformers"), NanochatForCausalLM.__name__, NanochatForCausalLM)
    app(["serve", *argv])


if __name__ == "__main__":
    main()
