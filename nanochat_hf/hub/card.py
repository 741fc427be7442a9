"""The model card of a pushed model: metadata with results, training table, curves, snippets, limits; a person's text is kept."""

import json
import math
import re
from pathlib import Path, PurePath

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
    "dtype",
    "seed",
)


def hub_name(name):
    """ "org/name@v1" → ("org/name", "v1"); "org/name" → ("org/name", None); a file, an existing folder or another path → None."""
    found = HUB_NAME.match(str(name or ""))
    if not found or Path(str(name)).exists() or found["id"].endswith(DATA_SUFFIXES):
        return None
    return found["id"], found["revision"]


def machine_of(settings):
    """What training recorded of where it ran, for the table: {"hardware": "2 × NVIDIA H100, mixed precision bf16", "versions": "torch 2.13.0, …"}."""
    rows = {}
    if settings.get("device_name"):
        rows["hardware"] = (
            f"{settings.get('num_processes', 1)} × {settings['device_name']}, mixed precision {settings.get('mixed_precision')}"
        )
    versions = {"python": settings.get("python")} | {
        k.removesuffix("_version"): v for k, v in settings.items() if k.endswith("_version")
    }
    if any(versions.values()):
        rows["versions"] = ", ".join(f"{name} {found}" for name, found in versions.items() if found)
    if settings.get("git_revision"):
        rows["code"] = f"git {settings['git_revision'][:12]}"
    return rows


def public(value):
    """`value` without the folders of this machine: absolute paths keep their last part, in dicts and lists too.

    public({"data": "/home/me/chats.jsonl", "model": "org/name"}) → {"data": "chats.jsonl", "model": "org/name"}
    """
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "../", "./")) or re.match(r"[A-Za-z]:\\", value)):
        return PurePath(value.replace("\\", "/")).name
    return value


def read_results(path):
    """{"gsm8k": 0.41, "core": 0.2} from what the evaluation scripts write: a list of {name, accuracy} or a mapping to numbers.

    ValueError where the file cannot be read or holds no figures.
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


def results_of(metrics, extra=None):
    """Figures for the model index: the least val/bpb, the last of every other evaluation in `metrics`, then `extra`."""
    found = {}
    for row in metrics:
        for key, value in row.items():
            evaluated = key.startswith(("val/", "eval/", "core", "chat"))
            if (
                not evaluated
                or isinstance(value, bool)
                or not isinstance(value, int | float)
                or not math.isfinite(value)
            ):
                continue
            found[key] = min(value, found.get(key, value)) if key == "val/bpb" else value
    return found | (extra or {})


def eval_results(figures, datasets):
    """`figures` (name → number) as huggingface_hub.EvalResult; bpb is measured on the held-out part of the training data."""
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


def kept_text(card):
    """The text between the marks of an existing card (str or None). A card that is not ours is a person's work: all of its body."""
    if not card:
        return ""
    if KEEP_START in card and KEEP_END in card:
        return card.split(KEEP_START, 1)[1].split(KEEP_END, 1)[0].strip()
    return "" if WRITTEN in card else re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.S).strip()


def data_sets(settings):
    """Hub names and the names of generated tasks in a run's settings: (["org/chats"], ["spelling_bee"])."""
    entries = settings.get("train_data") or [{"path": settings.get("data"), "task": None}]
    named = [hub_name(e.get("path"))[0] if hub_name(e.get("path")) else TASK_DATA.get(e.get("task")) for e in entries]
    tasks = [e["task"] for e, name in zip(entries, named, strict=True) if e.get("task") and not name]
    return list(dict.fromkeys(n for n in named if n)), list(dict.fromkeys(tasks))


def _existing_metadata(existing):
    try:
        return ModelCard(existing, ignore_metadata_errors=True).data.to_dict() if existing else {}
    except Exception:  # a person's malformed front matter must not stop a push; their text below it is kept
        return {}


def card_data(name, settings, figures, existing=None, license=None, language=None):
    """ModelCardData. Licence, language and fields of their own that a person wrote into the `existing` card stay."""
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
        "license": license or extra.pop("license", None) or "apache-2.0",
        "language": language or extra.pop("language", None) or "en",
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
