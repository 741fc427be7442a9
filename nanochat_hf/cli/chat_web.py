"""Serve a model: a page to talk to it in the browser, and OpenAI's API for programs, on one port.

python -m scripts.chat_web --model DIR    (needs the extra: pip install 'nanochat_hf[web]')

The page is http://127.0.0.1:7860, the API http://127.0.0.1:7860/v1: /v1/chat/completions, /v1/completions, /v1/models.
Both are on this machine alone unless --host or --share says otherwise. Requests run together in --rows rows; the
calculator's calls are answered. Nothing can be uploaded, and nothing is loaded from other hosts.
"""

import argparse
import contextlib
import secrets
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_hf.config import user_errors
from nanochat_hf.generation import Continuous, check_sampling

from .chat_cli import add_model_arguments, load_model
from .model_facts import about, examples, settings_of, sources

if TYPE_CHECKING:
    from nanochat_hf.serving.app import Site

IDLE = 100  # connections beyond those that can be answered; with more, a new one gets a 503
GRACE = 3  # seconds that running answers have to end after Ctrl-C
PREFILL = 512  # tokens of prompts in one pass: reading more at once would hold up the running answers


def model_name(model: str) -> str:
    """What the page and the API call a model, without the folders above it.

    >>> model_name("/home/me/runs/poet/final"), model_name("me/poet")
    ('poet', 'me/poet')
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and not folder.is_absolute():
        return model
    folder = folder if folder.name else folder.resolve()
    return folder.parent.name if folder.name in ("final", "best") else folder.name


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; ValueError for values that cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is this machine alone")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    parser.add_argument("--name", help="what requests call the model (default: from --model)")
    parser.add_argument("--rows", type=int, default=32, help="answers that are computed together")
    parser.add_argument("--waiting", type=int, default=64, help="answers that may wait beyond those; more get a 429")
    parser.add_argument("--length", type=int, help="positions of prompt and answer together (default: the model's)")
    parser.add_argument("--api-key", help="serve only requests that carry this key")
    parser.add_argument(
        "--share",
        action="store_true",
        help="ask gradio for a public address: anyone who has it can use the model (needs gradio)",
    )
    args = parser.parse_args(argv)
    check_sampling(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.rows < 1 or args.waiting < 0:
        raise ValueError(f"--rows {args.rows} --waiting {args.waiting}: at least 1 and 0")
    if args.share and not find_spec("gradio"):
        raise ValueError("--share needs gradio, whose tunnel it uses; pip install gradio, or leave it out")
    if args.api_key == "":
        raise ValueError("--api-key is empty; give a key, or leave the flag out to serve everyone who can connect")
    return args


def build_site(args: argparse.Namespace) -> "Site":
    """The model, its scheduler and what the page shows; ValueError where the model cannot be served."""
    from nanochat_hf.serving import Scheduler, Served
    from nanochat_hf.serving.app import Site

    model, tokenizer = load_model(args)
    engine = Continuous(model, tokenizer, rows=args.rows, length=args.length)
    engine.prefill = PREFILL
    card = Path(args.model) / "README.md"
    trained_on = sources(settings_of(Path(args.model)), card.read_text("utf-8") if card.is_file() else None)
    settings: dict[str, Any] = {
        "about": about(model, trained_on),
        "examples": examples(trained_on),
        "system": args.system,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
    }
    served = Served(args.name or model_name(args.model), engine, args.max_new_tokens, args.seed)
    return Site(served, Scheduler(engine, args.waiting), args.api_key, settings)


def share(port: int) -> str:
    """A public address that leads to this port, by gradio's tunnel; ValueError where there is none."""
    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception as error:
        raise ValueError(f"--share: gradio gave no public address ({error}); leave it out") from None


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C."""
    args = parse(argv)
    import uvicorn  # before the model is loaded: where it is missing, one line says so at once

    from nanochat_hf.serving.app import build_app

    site = build_site(args)
    address = f"http://{args.host}:{args.port}"
    print(f"{site.served.name}: the page is {address}, the API {address}/v1 (Ctrl-C ends it)", file=sys.stderr)
    if args.share:
        print(f"public: {share(args.port)}", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.run(
            build_app(site),
            host=args.host,
            port=args.port,
            log_level="warning",
            limit_concurrency=args.rows + args.waiting + IDLE,
            timeout_graceful_shutdown=GRACE,
        )


if __name__ == "__main__":
    main()
