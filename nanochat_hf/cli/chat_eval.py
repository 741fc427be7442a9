"""Accuracy of a chat model on tasks, and ChatCORE: accelerate launch -m scripts.chat_eval --model DIR --tasks gsm8k,spelling_bee"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanochat_hf  # noqa: F401  registers our model with the Auto classes
from nanochat_hf.config import parse, user_errors
from nanochat_hf.evals.chat import CHAT_CORE, chat_core, chat_core_stderr, evaluate_task, evaluation_rows
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.tasks import get_task

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class EvalConfig:
    """Which model, on what."""

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
def main(argv=None):
    config, lists = parse([EvalConfig], argv, lists=("eval_data",), description=__doc__)
    chosen = chosen_tasks(config, lists.get("eval_data") or [])
    accelerator = build_accelerator(1, dtype=config.dtype)
    if config.output and accelerator.is_main_process:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():  # the others find what it downloaded and prepared
        model, tokenizer = load(config.model, DTYPES[accelerator.mixed_precision], config.trust_remote_code)
        rows = [evaluation_rows(task, path, config.limit) for task, path in chosen]
    model.to(
        "cpu" if accelerator.device.type == "xla" else accelerator.device
    )  # each new length would be a new program of XLA
    results = []
    for (task, _), task_rows in zip(chosen, rows, strict=True):
        if task.notice and accelerator.is_main_process:
            print(task.notice(), flush=True)
        settings = dict(
            batch_size=config.batch_size, max_new_tokens=config.max_new_tokens, progress=accelerator.is_main_process
        )
        results.append(
            (evaluate_task(model, tokenizer, task, task_rows, accelerator=accelerator, **settings), task.baseline)
        )
    if accelerator.is_main_process:
        summary = [(result, baseline) for result, baseline in results if result.name in CHAT_CORE]
        print(table(results) + ("\n" + core_line(summary, config.limit) if summary else ""), flush=True)
        if config.output:
            write(config, results, summary, accelerator.num_processes)
    accelerator.end_training()


def chosen_tasks(config, entries):
    """[(Task, path or None)] of --tasks with the recipe's paths, else all of the recipe's `entries`; ValueError for unknown ones."""
    for entry in entries:
        if not isinstance(entry, dict) or "task" not in entry or set(entry) - {"task", "path"}:
            raise ValueError(
                f"eval_data: {entry!r} must be a mapping such as {{task: gsm8k, path: test.jsonl.gz}}; path may be left out"
            )
    paths = {entry["task"]: entry.get("path") for entry in entries}
    names = config.tasks.split(",") if config.tasks else list(paths) or CHAT_CORE
    return [(get_task(name.strip()), paths.get(name.strip())) for name in names]


def load(name, dtype, trust_remote_code=False):
    """(model, tokenizer) of a folder or Hub name, in evaluation mode; ValueError where they cannot be loaded."""
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        return model.eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"--model {name}: comes with code of its own; read it, and give --trust-remote-code to run it"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--model {name}: cannot be loaded ({reason}); give the folder or the Hub name of a model"
        ) from None


def table(results):
    """Markdown: a line a task."""
    lines = ["| task | accuracy | ± stderr | correct | questions |", "|---|---|---|---|---|"]
    return "\n".join(
        lines + [f"| {r.name} | {r.accuracy:.1%} | {r.stderr:.1%} | {r.correct} | {r.total} |" for r, _ in results]
    )


def core_line(summary, limit=None):
    """ChatCORE, called partial where tasks are missing, with the limit where there is one."""
    missing = missing_tasks(summary)
    partial = f", partial: {len(summary)} of {len(CHAT_CORE)} tasks, without {', '.join(missing)}" if missing else ""
    sampled = f", at most {limit} questions a task" if limit else ""
    return f"ChatCORE {chat_core(summary):.4f} ± {chat_core_stderr(summary):.4f}{partial}{sampled}"


def missing_tasks(summary):
    """The tasks of ChatCORE that were not evaluated."""
    return [name for name in CHAT_CORE if name not in {result.name for result, _ in summary}]


def write(config, results, summary, processes):
    """Results and all answers as JSON, and the table as Markdown where asked; each file appears whole."""
    found, missing = (
        {"model": config.model, "settings": asdict(config) | {"processes": processes}},
        missing_tasks(summary),
    )
    if summary and not missing:
        found["chatcore"] = chat_core(summary)
    if summary:  # in a mapping of its own, which model cards do not quote
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
    texts = {Path(config.output): json.dumps(found, indent=1, ensure_ascii=False)}
    if config.markdown:
        texts[Path(config.output).with_suffix(".md")] = table(results) + (
            "\n\n" + core_line(summary, config.limit) if summary else ""
        )
    for path, text in texts.items():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main()
