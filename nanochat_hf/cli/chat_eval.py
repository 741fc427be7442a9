"""Accuracy of a chat model on tasks, and ChatCORE.

accelerate launch -m nanochat_hf.cli.chat_eval --model DIR --tasks gsm8k,spelling_bee
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import nanochat_hf  # noqa: F401  registers our model with the Auto classes
from nanochat_hf.config import parse, user_errors
from nanochat_hf.evals.chat import (
    CHAT_CORE,
    ChatOptions,
    TaskResult,
    chat_core,
    chat_core_stderr,
    chosen_tasks,
    evaluate_task,
    evaluation_rows,
)
from nanochat_hf.machine.accelerator import build_accelerator

Graded = tuple[TaskResult, float]  # a result and the accuracy of guessing
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EvalConfig:
    """Which model to evaluate, and on what."""

    model: str = field(metadata={"help": "folder or Hub name: ours, or any causal language model with a chat template"})
    tasks: str | None = field(
        default=None,
        metadata={"help": "task names, with commas (default: those of the recipe, or the six of ChatCORE)"},
    )
    limit: int | None = field(default=None, metadata={"help": "held-out questions a task (default: all)"})
    batch_size: int = field(default=64, metadata={"help": "questions that a process answers at once"})
    max_new_tokens: int = field(default=512, metadata={"help": "longest answer in tokens"})
    dtype: str | None = field(
        default=None,
        metadata={"help": "float32, bfloat16 or float16 (default: the launcher's; on a CPU the faster one, measured)"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the code that comes with a model of another architecture"}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results and every answer"})
    markdown: bool = field(default=False, metadata={"help": "write the table beside OUTPUT too, as .md"})

    def __post_init__(self):
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.markdown and not self.output:
            raise ValueError("--markdown true writes beside --output; give --output")


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, print the table, and write the results if --output is given."""
    config, lists = parse([EvalConfig], argv, lists=("eval_data",), description=__doc__)
    chosen = chosen_tasks(config.tasks, lists.get("eval_data") or [])
    accelerator = build_accelerator(1, dtype=config.dtype)
    if config.output and accelerator.is_main_process:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # the others then find its downloads in the cache
        model, tokenizer = load(config.model, DTYPES[accelerator.mixed_precision], config.trust_remote_code)
        rows = [evaluation_rows(task, path, config.limit) for task, path in chosen]
    # XLA would compile a program for each new length, so generation runs on the CPU there
    model.to("cpu" if accelerator.device.type == "xla" else accelerator.device)
    options = ChatOptions(config.batch_size, config.max_new_tokens, accelerator.is_main_process)
    results: list[Graded] = []
    for (task, _), task_rows in zip(chosen, rows, strict=True):
        if task.notice and accelerator.is_main_process:
            print(task.notice(), flush=True)
        result = evaluate_task(model, tokenizer, task, task_rows, accelerator=accelerator, options=options)
        results.append((result, task.baseline))
    if accelerator.is_main_process:
        summary = [(result, baseline) for result, baseline in results if result.name in CHAT_CORE]
        print(table(results) + ("\n" + core_line(summary, config.limit) if summary else ""), flush=True)
        if config.output:
            write(config, results, summary, accelerator.num_processes)
    accelerator.end_training()


def load(
    name: str, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder or Hub name, in evaluation mode, and its tokenizer; ValueError if one cannot be loaded."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        return model.eval(), cast(PreTrainedTokenizerBase, tokenizer)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"--model {name}: comes with code of its own; read it, and give --trust-remote-code to run it"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--model {name}: cannot be loaded ({reason}); give the folder or the Hub name of a model"
        ) from None


def table(results: Sequence[Graded]) -> str:
    """The results as a Markdown table with a line for each task."""
    lines = ["| task | accuracy | ± stderr | correct | questions |", "|---|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {r.name} | {r.accuracy:.1%} | {r.stderr:.1%} | {r.correct} | {r.total} |" for r, _ in results]
    )


def core_line(summary: Sequence[Graded], limit: int | None = None) -> str:
    """One line with ChatCORE. It says whether tasks are missing, and at most how many questions each task had."""
    missing = missing_tasks(summary)
    partial = f", partial: {len(summary)} of {len(CHAT_CORE)} tasks, without {', '.join(missing)}" if missing else ""
    sampled = f", at most {limit} questions a task" if limit else ""
    return f"ChatCORE {chat_core(summary):.4f} ± {chat_core_stderr(summary):.4f}{partial}{sampled}"


def missing_tasks(summary: Sequence[Graded]) -> list[str]:
    """The tasks of ChatCORE that were not evaluated."""
    return [name for name in CHAT_CORE if name not in {result.name for result, _ in summary}]


def write(config: EvalConfig, results: Sequence[Graded], summary: Sequence[Graded], processes: int) -> None:
    """Write results and answers as JSON and, with --markdown, the table. A file appears whole or not at all."""
    settings: Mapping[str, Any] = asdict(config) | {"processes": processes}
    found: dict[str, Any] = {"model": config.model, "settings": settings}
    missing, output = missing_tasks(summary), Path(config.output or "")
    if summary and not missing:
        found["chatcore"] = chat_core(summary)
    if summary:  # nested, because model cards quote the numbers of the top level
        found["chatcore_of_these_tasks"] = {
            "value": chat_core(summary),
            "stderr": chat_core_stderr(summary),
            "missing": missing,
        }
    found["tasks"] = [
        {
            "name": r.name,
            "accuracy": r.accuracy,
            "stderr": r.stderr,
            "baseline": baseline,
            "correct": r.correct,
            "total": r.total,
            "answers": r.answers,
        }
        for r, baseline in results
    ]
    texts = {output: json.dumps(found, indent=1, ensure_ascii=False)}
    if config.markdown:
        core = "\n\n" + core_line(summary, config.limit) if summary else ""
        texts[output.with_suffix(".md")] = table(results) + core
    for path, text in texts.items():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main()
