"""What the chat page says about a model, and what it proposes to ask."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from nanochat_hf.hub.card import public
from nanochat_hf.tasks import TASKS, Task

EXAMPLES = 4
GENERATED = ("simple_spelling", "spelling_bee", "calculator", "identity")  # tasks whose rows are made by code
GENERAL = ("Who are you?", "Why is the sky blue?", "Write a short poem about the sea.", "What is 12 times 7?")


def settings_of(folder: Path) -> Mapping[str, Any]:
    """The settings of the run whose final/ or best/ `folder` is, or that were pushed with the model; {} for neither."""
    for path in (folder.parent / "config.json", folder / "training_config.json"):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and "train_data" in found:
                return found
    return {}


def sources(settings: Mapping[str, Any], card: str | None = None) -> list[str]:
    """Names of what a model was trained on, without folders; from a run's settings, else from a model card.

    >>> sources({"train_data": [{"path": "/home/me/chats.jsonl"}, {"task": "calculator"}]})
    ['chats.jsonl', 'calculator']
    """
    entries = settings.get("train_data") or []
    names = [public(e.get("path") or e.get("task")) for e in entries if isinstance(e, Mapping)]
    if not names and card:
        with contextlib.suppress(Exception):  # a malformed card tells nothing
            listed = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("datasets") or []
            names = [listed] if isinstance(listed, str) else list(listed)
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def about(model: PreTrainedModel, trained_on: Sequence[str]) -> str:
    """Two lines: size, and data."""
    config, size = model.config, sum(p.numel() for p in model.parameters())
    layers = config.num_hidden_layers
    lines = [
        f"{_shown(size)} parameters, {layers} layer{'s' * (layers > 1)}, {config.vocab_size:,} tokens, "
        f"{config.max_position_embeddings:,} positions."
    ]
    return "\n".join([*lines, *([f"Trained on {', '.join(trained_on)}."] if trained_on else [])])


def examples(trained_on: Sequence[str]) -> list[str]:
    """Questions of the kinds that the model was trained to answer, in turns; general ones where no kind is known."""
    tasks = [TASKS[name] for name in trained_on if name in GENERATED]
    asked = [_question(task, row) for row in range(EXAMPLES) for task in tasks[: EXAMPLES - row]]
    return list(dict.fromkeys([*asked, *GENERAL]))[:EXAMPLES]


def _question(task: Task, row: int) -> str:
    rows = task.load("test", limit=row + 1)
    return next(m["content"] for m in task.to_conversation(rows[row])["messages"] if m["role"] == "user")


def _shown(number: int) -> str:
    """1234567 → "1.2 million"."""
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)
