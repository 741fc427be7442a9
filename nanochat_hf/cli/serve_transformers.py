"""transformers' own server for a folder of ours: python -m scripts.serve_transformers MODEL [flags].

`transformers serve` looks a model's class up by its name in transformers itself, where the class of a folder with
its own code never is. This command puts the class there, for its own process only, and then is `transformers serve`.
"""

import sys
from typing import Any


def main(argv: list[str] | None = None) -> None:
    """Serve; needs transformers[serving]."""
    # the command line first: it holds another copy of the module transformers than a later import gives
    from transformers.cli.transformers import main as transformers_main  # isort: skip
    from transformers.cli.serving import model_manager

    from nanochat_hf.model import NanochatForCausalLM

    transformers: Any = model_manager.transformers  # Any: a module declares no attribute of ours
    transformers.NanochatForCausalLM = NanochatForCausalLM
    sys.argv = ["transformers", "serve", *(sys.argv[1:] if argv is None else argv)]
    transformers_main()


if __name__ == "__main__":
    main()
