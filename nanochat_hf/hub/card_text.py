"""The body of the model card: what the model is, three ways to use it, results, training, limits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card import KEEP_END, KEEP_START, SHOWN, WRITTEN, data_sets, hub_name, machine_of, public

USE_CHAT = 'messages = [{{"role": "user", "content": "Why is the sky blue?"}}]'
PIPELINE = """\
```python
from transformers import pipeline

chat = pipeline("text-generation", model="{id}"{revision}, trust_remote_code=True)
{prompt}
print(chat({argument}, max_new_tokens=128)[0]["generated_text"])
```"""
GENERATE_CHAT = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{id}"{revision})
model = AutoModelForCausalLM.from_pretrained("{id}"{revision}, trust_remote_code=True)
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=128, do_sample=True, temperature=0.8, top_k=50)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
GENERATE_TEXT = """\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{id}"{revision})
model = AutoModelForCausalLM.from_pretrained("{id}"{revision}, trust_remote_code=True)
ids = [tokenizer.bos_token_id, *tokenizer.encode("The capital of France is", add_special_tokens=False)]
output = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""
CONTINUE = """\
```bash
accelerate launch -m nanochat_hf.cli.chat_sft --model {name} --data your_chats.jsonl --max-seq-len {length} \\
  --output-dir runs/mine
```"""
RESUME = (
    "\n\nThe newest training state is in `last-checkpoint/`: give `--resume {name}` with the flags of "
    "`training_config.json` to go on where it stopped."
)
LIMITS = """\
- A model of this size often states falsehoods with confidence; check what it says before using it.
- It saw mostly the languages of its training data, and rows of at most {length} tokens; longer inputs are outside of
  its training.
- Nothing was done against harmful, biased or private content beyond what the makers of the training data did; do not
  use it where errors hurt people.
- The tokens `<|python_start|>…<|python_end|>` ask for a calculator that only the training code's chat programs answer;
  elsewhere the model may invent the result.
- Figures above were measured by the training code on held-out data and are not comparable with other prompts,
  tokenizers or harnesses."""


@dataclass(frozen=True)
class Card:
    """What a card's text is made from.

    `folder` holds config.json and *.safetensors; `settings` and `metrics` are the run's; `figures` its results by name;
    `revision` a branch of the repository; `curves` and `checkpoint` say whether curves.png and last-checkpoint/ are in
    the repository; `kept` is the text that a person wrote.
    """

    repo_id: str
    folder: Path
    settings: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float]
    revision: str | None = None
    curves: bool = False
    checkpoint: bool = False
    kept: str = ""


def count_parameters(folder: Path) -> int:
    """Number of parameters in the safetensors files of `folder`, from their headers."""
    from safetensors import safe_open

    total = 0
    for part in Path(folder).glob("*.safetensors"):
        with safe_open(part, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  this class has keys(), but cannot be iterated
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


def training_rows(settings: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """The training table: pairs of a name and a value, from the last log entry, the machine and the settings."""
    last: Mapping[str, Any] = next((row for row in reversed(metrics) if "train/tokens" in row), {})
    mfu = [row["train/mfu"] for row in metrics if "train/mfu" in row]
    rows: list[tuple[str, Any]] = []
    if last:
        rows += [
            ("steps", f"{last['step']:,}"),
            ("tokens", f"{last['train/tokens']:,}"),
            ("final loss", f"{last['train/loss']:.4f}"),
        ]
        rows += [("FLOPs", f"{last['train/total_flops']:.3g}"), ("training time", _duration(last["train/seconds"]))]
    if mfu:
        rows.append(("MFU (mean of the log)", f"{sum(mfu) / len(mfu):.1%}"))
    rows += machine_of(settings).items()
    return rows + [(f"`{key}`", settings[key]) for key in SHOWN if settings.get(key) is not None]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows])


def _summary(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    chat, base = "model" in settings, hub_name(settings.get("model"))
    kind = "chat model, fine-tuned" if chat else "base model, trained"
    origin = f" from [{base[0]}](https://huggingface.co/{base[0]})" if base else ""
    named, tasks = data_sets(settings)
    links = [f"[{n}](https://huggingface.co/datasets/{n})" for n in named] + [f"`{t}`" for t in tasks]
    made = " (names without a link: conversations made by the training code)" if tasks else ""
    data = f" Trained on {', '.join(links)}{made}." if links else ""
    return config, (
        f"A nanochat {kind}{origin} with nanochat_hf, [nanochat](https://github.com/karpathy/nanochat)'s recipe as a "
        f"Hugging Face Accelerate trainer: {count_parameters(folder):,} parameters, "
        f"{config['num_hidden_layers']} layers of width {config['hidden_size']}, "
        f"{config['num_attention_heads']} heads, a vocabulary of {config['vocab_size']:,} tokens, "
        f"{config['max_position_embeddings']:,} positions.{data}"
    )


def card_body(card: Card) -> str:
    """The card's text in Markdown, with the kept text between its marks."""
    config, summary = _summary(card.folder, card.settings)
    chat = "model" in card.settings
    fill = {
        "id": card.repo_id,
        "revision": f', revision="{card.revision}"' if card.revision else "",
        "name": f"{card.repo_id}@{card.revision}" if card.revision else card.repo_id,
        "length": card.settings.get("max_seq_len", config["max_position_embeddings"]),
        "argument": "messages" if chat else "prompt",
        "prompt": USE_CHAT.format() if chat else 'prompt = "<|bos|>The capital of France is"',
    }
    names = {"val/bpb": "validation bits per byte (lowest)"}
    parts = [
        f"# {card.repo_id.split('/')[-1]}",
        f"{KEEP_START}\n{card.kept}\n{KEEP_END}",
        WRITTEN,
        summary,
        "## Use",
        "With a pipeline:",
        PIPELINE.format(**fill),
        "With `generate`:",
        (GENERATE_CHAT if chat else GENERATE_TEXT).format(**fill),
        "Continue training, where nanochat_hf is installed:",
        CONTINUE.format(**fill) + (RESUME.format(**fill) if card.checkpoint else ""),
    ]
    if card.figures:
        shown = [(names.get(name, name), f"{value:.4f}") for name, value in card.figures.items()]
        parts += ["## Results", _table(("what", "value"), shown)]
    parts += ["## Training", _table(("what", "value"), training_rows(public(card.settings), card.metrics))]
    if card.curves:
        parts.append("![loss, validation bits per byte and learning rate over the steps](curves.png)")
    if card.metrics:
        parts.append("The whole configuration is in `training_config.json`, the log in `metrics.jsonl`.")
    parts += ["## Limits", LIMITS.format(**fill)]
    return "\n\n".join(parts) + "\n"
