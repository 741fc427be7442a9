"""Talk to a model in the terminal.

python -m scripts.chat_cli --model DIR [-p "one question"]

Ctrl-C stops an answer, Ctrl-D or /quit leaves. What the calculator was asked and said stands in brackets.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from nanochat_hf.config import user_errors
from nanochat_hf.generation import Chat, Engine, check_sampling, show
from nanochat_hf.machine import cpu
from nanochat_hf.tokenizer import load_tokenizer

# a terminal would obey control characters that a model writes
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")
HELP = """\
/clear          begin anew, with the same system message
/system TEXT    begin anew with this system message; without TEXT, with none
/save FILE      append the conversation to FILE, a line of JSON that chat_sft --data takes
/help           this
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""


def printable(pieces: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    r"""(kind, text) … with � in place of every control character but tab and line feed.

    >>> list(printable([("text", "\x1b[2J\n")]))
    [('text', '�[2J\n')]
    """
    return ((kind, text.translate(CONTROLS)) for kind, text in pieces)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that chats."""
    parser.add_argument("--model", required=True, help="folder (final/ of a run) or Hub name of a chat model")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, 1 the model's own probabilities")
    parser.add_argument("--top-k", type=int, default=50, help="sample among so many tokens; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample among the likeliest tokens that have this probability together"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--seed", type=int, default=0, help="the same seed and questions give the same answers")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "auto"),
        help="of the weights (default: bfloat16 on CUDA, else the faster of the two, measured)",
    )


def load_chat(args: argparse.Namespace) -> Chat:
    """A Chat from the flags; ValueError for settings that cannot be, before anything is loaded, and for no model."""
    settings = dict(
        max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
    )
    check_sampling(**settings)
    model, tokenizer = load_model(args)
    return Chat(Engine(model, tokenizer), system=args.system, seed=args.seed, **settings)


def load_model(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model of --model, ready to generate, and its tokenizer; ValueError where there is none."""
    folder = Path(args.model)
    if not folder.is_dir() and (folder.is_absolute() or args.model.count("/") != 1):
        raise ValueError(
            f"--model {args.model}: no such folder; give the final/ folder of a run, or a Hub name such as you/model"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        inner = folder / "final"
        remedy = f"did you mean {inner}?" if (inner / "config.json").is_file() else "give the final/ folder of a run"
        raise ValueError(f"--model {args.model}: holds no config.json, so no model; {remedy}")
    disable_progress_bar()
    tokenizer = load_tokenizer(args.model)
    device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    if device.type == "cpu":
        cpu.set_threads()
    dtype = args.dtype or cpu.best_dtype(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().to(device)
    except OSError as error:
        raise ValueError(f"--model {args.model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    return model, tokenizer


def command(chat: Chat, line: str) -> None:
    """Do what a line that begins with a slash says."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/clear":
        chat.clear(next((m["content"] for m in chat.messages[:1] if m["role"] == "system"), None))
        print("(begun anew)")
    elif name == "/system":
        chat.clear(rest or None)
        print("(begun anew)")
    elif name == "/save":
        save(chat, rest)
    elif name == "/help":
        print(HELP)
    else:
        print(f"{name} is unknown; /help lists the commands")


def save(chat: Chat, path: str) -> None:
    """Append the conversation to a file, or say why not."""
    if not path or not chat.ids:
        print("/save needs a file's name" if not path else "nothing was said yet")
        return
    try:
        with open(path, "a") as file:
            file.write(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n")
        print(f"(saved to {path})")
    except OSError as error:
        print(f"{path}: {error.strerror}; give another file")


def answer(chat: Chat, line: str, colour: bool) -> None:
    """Print the answer as it comes; Ctrl-C stops it."""
    marks = ("\033[2m[", " → ", "]\033[0m") if colour else ("[", " → ", "]")
    pieces = chat.ask(line)
    try:
        with contextlib.closing(pieces):
            for piece in show(printable(pieces), marks):
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(("\033[0m" if colour else "") + " (stopped)")
    except ValueError as error:
        print(error)


def converse(chat: Chat, colour: bool) -> None:
    """Read lines until the end."""
    print("Ask something; /help lists the commands.")
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if line.strip() == "/quit":
            return
        if line.startswith("/"):
            command(chat, line.strip())
        elif line.strip():
            answer(chat, line, colour)


@user_errors
def main(argv: list[str] | None = None) -> None:
    """Chat, or answer one question."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("-p", "--prompt", help="answer this and exit")
    args = parser.parse_args(argv)
    chat, colour = load_chat(args), sys.stdout.isatty()
    if args.prompt is not None:
        for piece in show(printable(chat.ask(args.prompt))):
            print(piece, end="", flush=True)
        print()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrows and history at the prompt
    converse(chat, colour)


if __name__ == "__main__":
    main()
