"""Look at what the model gets: packed rows with roles and targets, the mixture, and lengths of documents.

python -m scripts.show_data --config scripts/recipes/sft_local.yaml --tokenizer DIR --rows 2 --output runs/data
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nanochat_hf.config import parse, read_recipe, user_errors
from nanochat_hf.data.collate import Batch
from nanochat_hf.data.overlong import OVERLONG
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.tokenizer import load_tokenizer

COLOURS = {"user": "36", "assistant": "32", "python": "33", "output": "35", "padding": "90", "start": "1;34"}
ROLES = {
    "<|bos|>": "start",
    "<|user_start|>": "user",
    "<|assistant_start|>": "assistant",
    "<|python_start|>": "python",
    "<|output_start|>": "output",
    "<|python_end|>": "assistant",
    "<|output_end|>": "assistant",
}


@dataclass(frozen=True)
class ShowConfig:
    """Which data, and how much of it. Every other key of a training recipe is passed over."""

    tokenizer: str = field(metadata={"help": "folder or Hub name of the tokenizer"})
    data: str | None = field(default=None, metadata={"help": "conversations instead: a Hub name or a file"})
    rows: int = field(default=2, metadata={"help": "packed rows to print"})
    first: int = field(default=0, metadata={"help": "number of the first of them"})
    max_seq_len: int | None = field(
        default=None, metadata={"help": "positions of a row (default: the recipe's, else 2048)"}
    )
    overlong: str | None = field(
        default=None, metadata={"help": f"{', '.join(OVERLONG)} (default: the recipe's, else truncate)"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the order"})
    num_proc: int | None = field(default=None, metadata={"help": "processes that tokenise"})
    color: bool = field(
        default=True, metadata={"help": "colours, where the output is a terminal or --force-color is given"}
    )
    force_color: bool = field(default=False, metadata={"help": "colours also in a file or a pipe"})
    output: str | None = field(default=None, metadata={"help": "folder for lengths.png and mixture.png"})


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Pack the data as chat_sft does, and print some rows, the mixture and the lengths."""
    show, sources, recipe = settings(sys.argv[1:] if argv is None else argv)
    tokenizer = load_tokenizer(show.tokenizer)
    batches = SFTBatches(
        sources,
        tokenizer,
        rows=1,
        positions=show.max_seq_len or recipe.get("max_seq_len", 2048),
        seed=show.seed,
        progress=True,
        prefetch=0,
        overlong=show.overlong or recipe.get("overlong", "truncate"),
        num_proc=show.num_proc,
        train_on_all_tokens=recipe.get("train_on_all_tokens", False),
        isolate=recipe.get("isolate", True),
        bad_rows=recipe.get("bad_rows", "error"),
    )
    batches.next_row = show.first
    coloured = show.color and (sys.stdout.isatty() or show.force_color)
    print(
        "\n"
        + " ".join(paint(name, name, coloured) for name in COLOURS)
        + "; trained tokens are underlined, or between ⟦ and ⟧ without colours"
    )
    for number, batch in enumerate(islice(iter(batches), show.rows), show.first):
        print(f"\nrow {number} of {batches.num_rows:,}: {described(batch)}")
        print(drawn(batch, tokenizer, coloured))
    print("\n" + mixture_table(batches))
    lengths = batches.documents.lengths
    print("\n" + histogram(lengths))
    if show.output:
        folder = Path(show.output)
        folder.mkdir(parents=True, exist_ok=True)
        draw_pngs(batches, lengths, folder)
        print(f"\nwritten: {folder / 'lengths.png'}, {folder / 'mixture.png'}")


def settings(argv: Sequence[str]) -> tuple[ShowConfig, list[SourceConfig], dict[str, Any]]:
    """(ShowConfig, sources, the whole recipe). ValueError where neither flag nor recipe names data.

    The recipe is one for training, so keys that ShowConfig does not have are no error.
    """
    argv, recipe = list(argv), {}
    place = next((i for i, a in enumerate(argv) if a == "--config" and i + 1 < len(argv)), None)
    if place is not None:
        recipe = read_recipe(argv[place + 1])
        del argv[place : place + 2]
    show, _ = parse([ShowConfig], argv, description=__doc__)
    listed = SourceConfig.from_recipe_list(recipe.get("train_data"))
    sources = [SourceConfig(path=show.data)] if show.data else listed
    if not sources:
        raise ValueError("no data; give --data, or --config with a recipe that has train_data")
    return show, sources, recipe


def paint(text: str, role: str, coloured: bool, trained: bool = False) -> str:
    """`text` in the colour of its role, underlined where it is trained; without colours trained text stands in ⟦ ⟧."""
    if not coloured:
        return f"⟦{text}⟧" if trained else text
    return f"\x1b[{COLOURS[role]}{';4' if trained else ''}m{text}\x1b[0m"


class TextSpan(NamedTuple):
    """Neighbouring tokens of one kind: their text, whose they are, whether they are targets, whether a document begins.

    `role` is a key of COLOURS.
    """

    text: str
    role: str
    trained: bool
    begins: bool


def spans(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[TextSpan]:
    """The spans of a batch of one packed row, in order; neighbours of the same kind are joined.

    A token is trained where it is the target of the position before it, so the first token of a row never is.
    """
    ids, labels = batch["input_ids"][0].tolist(), batch["shift_labels"][0].tolist()
    names = tokenizer.convert_ids_to_tokens(ids)
    end = len(ids)
    while end > 0 and ids[end - 1] == tokenizer.pad_token_id and labels[end - 1] == -100:
        end -= 1
    # <|output_end|> is also the padding token: one that is a target belongs to the document
    if end < len(ids) and end and names[end] == "<|output_end|>" and labels[end - 1] != -100:
        end += 1
    found: list[tuple[list[int], str, bool, bool]] = []
    role = "start"
    for i, name in enumerate(names):
        closes = name in ("<|python_end|>", "<|output_end|>")
        following = ROLES.get(name, role)
        own = "padding" if i >= end else role if closes else following  # a closing mark still belongs to its part
        trained, begins = i > 0 and labels[i - 1] != -100, name == "<|bos|>"
        if found and found[-1][1:3] == (own, trained) and not begins:
            found[-1][0].append(ids[i])
        else:
            found.append(([ids[i]], own, trained, begins))
        role = following
    return [TextSpan(str(tokenizer.decode(tokens)), own, trained, begins) for tokens, own, trained, begins in found]


def drawn(batch: Batch, tokenizer: PreTrainedTokenizerBase, coloured: bool) -> str:
    """The row as text: a line per document, its padding as a count."""
    lines, padding = [], 0
    for text, role, trained, begins in spans(batch, tokenizer):
        if role == "padding":
            padding += text.count("<|output_end|>")
            continue
        if begins:
            lines.append("")
        lines[-1] += paint(text, role, coloured, trained)
    if padding:
        lines.append(paint(f"[{padding} × padding]", "padding", coloured))
    return "\n".join(f"{'│' if i else '┌'} {line}" for i, line in enumerate(lines))


def described(batch: Batch) -> str:
    """How many documents and targets a row has, in words."""
    restarts = int((batch["position_ids"][0] == 0).sum())
    trained = int((batch["shift_labels"] != -100).sum())
    places = f"{trained} of {batch['shift_labels'].numel()} places are trained"
    return f"{restarts} runs of positions (documents, and padding where there is some), {places}"


def short(label: str, most: int = 43) -> str:
    """The label of a source without the folders of its path, cut to `most` characters.

    >>> short("gsm8k:../data/gsm8k/train.jsonl.gz")
    'gsm8k:train.jsonl.gz'
    """
    return ":".join(part.rsplit("/", 1)[-1] if part.count("/") > 1 else part for part in label.split(":"))[:most]


def mixture_table(batches: SFTBatches) -> str:
    """What each source gives to an epoch, one line each."""
    total = sum(report.tokens for report in batches.reports)
    lines = [
        f"{'source':44}{'copies':>8}{'documents':>11}{'tokens':>13}{'share':>8}{'trained':>9}"
        f"{'cut':>7}{'split':>7}{'dropped':>9}{'no target':>11}"
    ]
    for r in batches.reports:
        share, trained = r.tokens / total, r.trained / max(1, r.tokens)
        lines.append(
            f"{short(r.label):44}{r.copies:>8g}{r.conversations:>11,}{r.tokens:>13,}{share:>8.1%}{trained:>9.1%}"
            f"{r.truncated:>7,}{r.split:>7,}{r.dropped:>9,}{r.untrained:>11,}"
        )
    lines.append(f"{batches.num_rows:,} rows, padding {batches.padding_share:.3%}")
    return "\n".join(lines)


def bins(lengths: np.ndarray) -> np.ndarray:
    """The edges of the histogram's bins, whole numbers: at most 24 bins, equally wide on a logarithmic scale."""
    return np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 25).astype(int))


def histogram(lengths: np.ndarray, width: int = 60) -> str:
    """Lengths of documents in tokens, as bars of text; the longest bar has `width` characters."""
    counts, edges = np.histogram(lengths, bins(lengths) if lengths.min() < lengths.max() else 1)
    middle = f"mean {lengths.mean():,.1f}, median {np.median(lengths):,.0f}"
    lines = [f"tokens of a document: {lengths.min():,} to {lengths.max():,}, {middle}"]
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(width * count / counts.max())
        lines.append(f"{int(low):>7,} to {max(int(low), int(high) - 1):>7,} {bar} {count:,}")
    return "\n".join(lines)


def draw_pngs(batches: SFTBatches, lengths: np.ndarray, folder: Path) -> None:
    """Write lengths.png, a histogram, and mixture.png, the tokens of each source, into `folder`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(lengths, bins=bins(lengths).tolist() if lengths.min() < lengths.max() else 1)
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="documents", title=f"{len(lengths):,} documents")
    figure.savefig(folder / "lengths.png", dpi=150)
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(batches.reports)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{i + 1}. {short(r.label)}" for i, r in enumerate(batches.reports)]
    axes.barh(names, [r.tokens for r in batches.reports], color="lightsteelblue", label="tokens")
    axes.barh(names, [r.trained for r in batches.reports], color="steelblue", label="trained tokens")
    axes.invert_yaxis()
    axes.legend()
    axes.set(xlabel="tokens of an epoch")
    figure.savefig(folder / "mixture.png", dpi=150)


if __name__ == "__main__":
    main()
