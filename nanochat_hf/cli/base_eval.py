"""Evaluate a base model: CORE, bits per byte, and samples.

accelerate launch -m nanochat_hf.cli.base_eval --model DIR --core-data eval_bundle.zip --data TEXT.jsonl
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.texts import Texts
from nanochat_hf.evals.bpb import evaluate_bpb, text_batches
from nanochat_hf.evals.core import BUNDLE_HELP, CoreResult, load_bundle
from nanochat_hf.evals.core_scoring import CoreOptions, evaluate_core
from nanochat_hf.evals.raw_bytes import raw_token_bytes
from nanochat_hf.generation import Engine
from nanochat_hf.machine.accelerator import Ranks, build_accelerator, sum_over_ranks

from .base_train import PROMPTS

EVALS = ("core", "bpb", "sample")


@dataclass(frozen=True)
class BaseEvalConfig:
    """Which model to evaluate, and on what."""

    model: str = field(metadata={"help": "folder or Hub name of any causal language model, its tokenizer beside it"})
    eval: str = field(default="core,bpb,sample", metadata={"help": "what to do, with commas: core, bpb, sample"})
    core_data: str | None = field(default=None, metadata={"help": f"for core: {BUNDLE_HELP}"})
    max_per_task: int | None = field(default=None, metadata={"help": "items of each CORE task (default: all)"})
    data: str | None = field(
        default=None, metadata={"help": "for bpb: a Hub name, a file, or a pattern of files with text"}
    )
    split: str = field(default="train", metadata={"help": "split, for a Hub name"})
    text_column: str = field(default="text", metadata={"help": "column that holds the text"})
    max_texts: int | None = field(
        default=None, metadata={"help": "texts for bpb, from the beginning of the data (default: all)"}
    )
    batch_tokens: int = field(
        default=8192, metadata={"help": "positions in a forward pass; lower it when memory runs out"}
    )
    dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16 (default: the launcher's; on a CPU the faster one, measured)"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the code that comes with a model of another architecture"}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON file for the results, a CSV beside it (default: base_eval.json beside the model's folder)"
        },
    )

    def __post_init__(self):
        unknown = [name for name in self.eval.split(",") if name not in EVALS]
        if unknown:
            raise ValueError(f"--eval {','.join(unknown)} is unknown; choose from {', '.join(EVALS)}")
        for name in ("batch_tokens", "max_per_task", "max_texts"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if "core" in self.eval.split(",") and self.core_data is None:
            raise ValueError(f"--eval core needs --core-data: {BUNDLE_HELP}")
        if "bpb" in self.eval.split(",") and self.data is None:
            raise ValueError("--eval bpb needs --data: a file of text, a pattern of files, or a Hub name")


def load_model(config: BaseEvalConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in evaluation mode on `device`, and its tokenizer. Raises ValueError if one cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {config.model}: cannot be loaded ({str(error).splitlines()[0]})") from None
    return model.eval().to(device), cast(PreTrainedTokenizerBase, tokenizer)


def load_texts(config: BaseEvalConfig) -> list[str]:
    """The texts of --data."""
    return list(Texts(SourceConfig(path=config.data, split=config.split, rows=config.max_texts), config.text_column))


def bits_per_byte(
    config: BaseEvalConfig,
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> float:
    """Bits per byte of `texts`. Warns if the tokenizer changes the text, because then its bytes are not the text's."""
    sizes = raw_token_bytes(tokenizer)
    positions = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048, 2048)
    ranks = dict(rank=accelerator.process_index, world_size=accelerator.num_processes)
    batches = list(text_batches(texts, tokenizer, positions=positions, batch_tokens=config.batch_tokens, **ranks))
    bpb = evaluate_bpb(model, batches, sizes, reduce=sum_over_ranks(accelerator))
    counted = sum(sizes[b["shift_labels"][b["shift_labels"] >= 0]].sum() for b in batches)
    counted = sum_over_ranks(accelerator)(torch.as_tensor(float(counted))).item()
    actual = sum(len(text.encode()) for text in texts)
    if abs(counted - actual) > 0.005 * actual:
        accelerator.print(
            f"warning: the tokens hold {counted:,.0f} bytes, the texts {actual:,}: the tokenizer changes the text"
        )
    return bpb


def show_core(result: CoreResult) -> None:
    """Print CORE as a table, and the tasks that had no data file."""
    print(f"{'task':<34}{'kind':<19}{'shots':>6}{'items':>7}{'accuracy':>10}{'guessing':>10}{'centred':>9}")
    for row in result.rows:
        shown = f"{row['accuracy']:>10.1%}{row['baseline']:>10.1%}{row['centred']:>9.4f}"
        print(f"{row['task']:<34}{row['kind']:<19}{row['shots']:>6}{row['items']:>7}{shown}")
    if result.missing:
        print(f"no data file: {', '.join(result.missing)}")
    print(f"{result.name}: {result.core:.4f}")


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write the results as JSON, and CORE's table as CSV beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if "core" in results:
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, results["core"]["tasks"][0])
            writer.writeheader()
            writer.writerows(results["core"]["tasks"])
    print(f"written to {path}" + (f" and {path.with_suffix('.csv')}" if "core" in results else ""))


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    """Greedy continuations of the prompts that base training shows too."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [start + tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
    answers = Engine(model, tokenizer).generate(ids, max_new_tokens=16)
    return [{"prompt": text, "answer": answer.text} for text, (answer,) in zip(PROMPTS, answers, strict=True)]


def default_output(model: str) -> Path:
    """base_eval.json beside the model's folder; for a name on the Hub, base_eval_NAME.json here."""
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve().parent / "base_eval.json"
    return Path(f"base_eval_{model.replace('/', '--')}.json")


@user_errors
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate, print and write the results, and return them."""
    config, _ = parse([BaseEvalConfig], argv, description=__doc__)
    wanted, results = config.eval.split(","), {"model": config.model}
    tasks, missing = load_bundle(config.core_data, config.max_per_task) if "core" in wanted else ([], [])
    texts = load_texts(config) if "bpb" in wanted else []
    accelerator = build_accelerator(1, dtype=config.dtype)
    model, tokenizer = load_model(config, accelerator.device)
    core = None
    with accelerator.autocast():
        if "core" in wanted:
            options = CoreOptions(config.max_per_task, config.batch_tokens, accelerator.is_main_process)
            ranks = Ranks.of(accelerator)
            core = evaluate_core(model, tokenizer, tasks, missing, options=options, ranks=ranks)
            results["core"] = {"name": core.name, "core": core.core, "tasks": core.rows, "missing": core.missing}
        if "bpb" in wanted:
            results["bpb"] = bits_per_byte(config, accelerator, model, tokenizer, texts)
        if "sample" in wanted and accelerator.is_main_process:
            results["samples"] = samples(model, tokenizer)
    if accelerator.is_main_process:
        if core is not None:
            show_core(core)
        if "bpb" in wanted:
            print(f"bits per byte: {results['bpb']:.6f} on {len(texts):,} texts")
        for sample in results.get("samples", ()):
            print(f"{sample['prompt']}|{sample['answer']}")
        write(Path(config.output) if config.output else default_output(config.model), results)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


if __name__ == "__main__":
    main()
