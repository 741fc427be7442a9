"""The metadata and the results of a model card, and what a person wrote into it, which every push keeps."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

KEEP_START, KEEP_END = "<!-- your text: kept at every push -->", "<!-- end of your text -->"
WRITTEN = "<!-- written by nanochat_hf at every push; only the text between the two marks above is kept -->"
HUB_NAME = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?$")
DATA_SUFFIXES = (".json", ".jsonl", ".gz", ".parquet", ".csv", ".arrow", ".txt")
TASK_DATA = {
    "gsm8k": "openai/gsm8k",
    "mmlu": "cais/mmlu",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "humaneval": "openai/openai_humaneval",
    "smoltalk": "HuggingFaceTB/smol-smoltalk",
}
SHOWN = (
    "recipe",
    "depth",
    "num_steps",
    "max_seq_len",
    "device_batch_size",
    "total_batch_size",
    "packing",
    "epochs",
    "embedding_lr",
    "unembedding_lr",
    "matrix_lr",
    "scalar_lr",
    "init_lr_frac",
    "weight_decay",
    "warmup_steps",
    "warmdown_ratio",
    "max_grad_norm",
    "train_on_all_tokens",
    "isolate",
    "reward",
    "questions",
    "num_samples",
    "max_new_tokens",
    "advantage",
    "normalisation",
    "clip",
    "kl",
    "updates",
    "refills",
    "dtype",
    "seed",
)


@dataclass(frozen=True)
class CardFacts:
    """What a push adds to a card: figures by name, and licence and language, which otherwise stay as they are."""

    results: Mapping[str, float] | None = None
    license: str | None = None
    language: str | None = None


def hub_name(name: str | Path | None) -> tuple[str, str | None] | None:
    """Split a name on the Hub into repository and revision; None for a file, a folder and anything else.

    >>> hub_name("org/name@v1"), hub_name("org/name"), hub_name("chats.jsonl")
    (('org/name', 'v1'), ('org/name', None), None)
    """
    found = HUB_NAME.match(str(name or ""))
    if not found or Path(str(name)).exists() or found["id"].endswith(DATA_SUFFIXES):
        return None
    return found["id"], found["revision"]


def machine_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """What training recorded about the machine, for the card's table: hardware, versions, code.

    >>> machine_of({"device_name": "H100", "num_processes": 2, "mixed_precision": "bf16"})
    {'hardware': '2 × H100, mixed precision bf16'}
    """
    rows: dict[str, str] = {}
    if settings.get("device_name"):
        rows["hardware"] = (
            f"{settings.get('num_processes', 1)} × {settings['device_name']}, "
            f"mixed precision {settings.get('mixed_precision')}"
        )
    versions = {"python": settings.get("python")} | {
        k.removesuffix("_version"): v for k, v in settings.items() if k.endswith("_version")
    }
    if any(versions.values()):
        rows["versions"] = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    if settings.get("git_revision"):
        rows["code"] = f"git {settings['git_revision'][:12]}"
    return rows


def public(value: Any) -> Any:
    """`value` without this machine's folders: a path keeps its last part only, also inside dicts and lists.

    >>> public({"data": "/home/me/chats.jsonl", "model": "org/name"})
    {'data': 'chats.jsonl', 'model': 'org/name'}
    """
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "../", "./")) or re.match(r"[A-Za-z]:\\", value)):
        return PurePath(value.replace("\\", "/")).name
    return value


def read_results(path: str | Path) -> dict[str, float]:
    """Figures by name from what the evaluation commands write, such as {"gsm8k": 0.41, "core": 0.2}.

    The file holds a list of {name, accuracy}, or a mapping to numbers. Raises ValueError if it cannot be read, and if
    it holds no figures.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--results {path}: cannot be read ({error}); give the JSON that chat_eval or base_eval wrote"
        ) from None
    entries = found.get("tasks", found) if isinstance(found, dict) else found
    if isinstance(entries, list):
        entries = {
            e["name"]: e["accuracy"] for e in entries if isinstance(e, dict) and {"name", "accuracy"} <= e.keys()
        }
    totals = {k: v for k, v in found.items() if k != "tasks"} if isinstance(found, dict) else {}
    figures = {
        k: float(v) for k, v in (entries | totals).items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    if not figures:
        raise ValueError(f"--results {path}: holds no figures; give the JSON that chat_eval or base_eval wrote")
    return figures


def results_of(metrics: Sequence[Mapping[str, Any]], extra: Mapping[str, float] | None = None) -> dict[str, float]:
    """Figures for the card: the lowest val/bpb and the last of every other evaluation in `metrics`, and `extra`."""
    found: dict[str, float] = {}
    for row in metrics:
        for key, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if number and key.startswith(("val/", "eval/", "core", "chat")):
                found[key] = min(value, found.get(key, value)) if key == "val/bpb" else value
    return found | dict(extra or {})


def eval_results(figures: Mapping[str, float], datasets: Sequence[str]) -> list[EvalResult]:
    """Figures by name as the Hub's EvalResult. Bits per byte are measured on held-out rows of the training data."""
    entries = []
    for name, value in figures.items():
        task = name.rsplit("/", 1)[-1]
        known = TASK_DATA.get(task.replace("-", "_").lower())
        if task == "bpb":
            where, metric = (
                (datasets[0] if len(datasets) == 1 else "held-out", "validation data"),
                ("bits_per_byte", "bits per byte"),
            )
        elif task in ("core", "chatcore"):
            where, metric = (task, task.upper()), (f"{task}_metric", f"centered accuracy ({task.upper()})")
        else:
            where, metric = (known or task, task), ("accuracy", "accuracy")
        entries.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=where[0],
                dataset_name=where[1],
                metric_type=metric[0],
                metric_name=metric[1],
                metric_value=round(value, 6),
            )
        )
    return entries


def kept_text(card: str | None) -> str:
    """The text that a push keeps: what stands between the marks, or the whole body of a card that a person wrote."""
    if not card:
        return ""
    if KEEP_START in card and KEEP_END in card:
        return card.split(KEEP_START, 1)[1].split(KEEP_END, 1)[0].strip()
    return "" if WRITTEN in card else re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.S).strip()


def data_sets(settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names of data sets on the Hub, and of tasks that generate their rows, in a run's settings.

    >>> data_sets({"train_data": [{"path": "org/chats"}, {"task": "spelling_bee"}]})
    (['org/chats'], ['spelling_bee'])
    """
    entries: Sequence[Mapping[str, Any]] = settings.get("train_data") or [{"path": settings.get("data"), "task": None}]
    named = [found[0] if (found := hub_name(e.get("path"))) else TASK_DATA.get(e.get("task", "")) for e in entries]
    tasks = [str(e["task"]) for e, name in zip(entries, named, strict=True) if e.get("task") and not name]
    names = [name for name in named if name is not None]
    return list(dict.fromkeys(names)), list(dict.fromkeys(tasks))


def _existing_metadata(existing: str | None) -> dict[str, Any]:
    try:
        return ModelCard(existing, ignore_metadata_errors=True).data.to_dict() if existing else {}
    except Exception:  # a malformed front matter must not stop a push; the text below it is kept
        return {}


def card_data(
    name: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    existing: str | None = None,
    facts: CardFacts | None = None,
) -> ModelCardData:
    """The card's metadata. What a person wrote into the `existing` card stays, unless `facts` say otherwise."""
    facts = facts or CardFacts()
    own = _existing_metadata(existing)
    base, (datasets, _) = hub_name(settings.get("model")), data_sets(settings)
    tags = [
        "nanochat",
        "nanochat_hf",
        "custom_code",
        *(["conversational"] if "model" in settings else []),
        *(own.pop("tags", None) or []),
    ]
    extra = {k: v for k, v in own.items() if k not in ("model-index", "model_name", "pipeline_tag", "library_name")}
    fields = {
        "license": facts.license or extra.pop("license", None) or "apache-2.0",
        "language": facts.language or extra.pop("language", None) or "en",
        "base_model": base[0] if base else extra.pop("base_model", None),
        "datasets": datasets or extra.pop("datasets", None),
    }
    results = eval_results(figures, datasets) or None
    return ModelCardData(
        **{k: v for k, v in extra.items() if k not in fields},
        **fields,
        tags=list(dict.fromkeys(tags)),
        pipeline_tag="text-generation",
        library_name="transformers",
        model_name=name.split("/")[-1],
        eval_results=results,
    )
