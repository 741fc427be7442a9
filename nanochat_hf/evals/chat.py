"""Accuracy on tasks, by generation or by the likeliest letter, over all ranks; and ChatCORE, their mean."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..conversation import SPECIAL_TOKENS, render_prompt
from ..generation import Engine
from ..tasks import get_task
from ..tasks.base import Task, answer_text

# (prompts, their numbers) → an answer each
Answer = Callable[[Sequence[Sequence[int]], Sequence[int]], list[str]]
CHAT_CORE = ("mmlu", "arc_easy", "arc_challenge", "gsm8k", "humaneval", "spelling_bee")


@dataclass
class TaskResult:
    """Accuracy of a task over `total` rows, its binomial standard error, and every answer.

    An answer holds index, task, question, answer, expected and correct.
    """

    name: str
    correct: int
    total: int
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        """The share of rows that are correct."""
        return self.correct / self.total

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy: √(p(1 − p)/n)."""
        return (self.accuracy * (1 - self.accuracy) / self.total) ** 0.5


@dataclass(frozen=True)
class ChatOptions:
    """How tasks are evaluated: questions answered at once, longest answer in tokens, and whether a bar is shown."""

    batch_size: int = 64
    max_new_tokens: int = 512
    progress: bool = True


def evaluation_rows(task: Task, path: str | Path | None = None, limit: int | None = None) -> list[Any]:
    """Held-out rows of a task: all, or `limit` of them, evenly spaced because files are sorted by subject.

    A task that generates its rows makes as many as `limit`. Raises ValueError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1; leave it out for all rows")
    rows = task.load("test", path=path)
    if limit is not None and len(rows) < limit:
        rows = task.load("test", path=path, limit=limit)
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def chosen_tasks(names: str | None, entries: Sequence[Any] = ()) -> list[tuple[Task, str | None]]:
    """The tasks in `names` (with commas), or else of a recipe's `entries`, or else of ChatCORE.

    Each comes with its local file or None. Raises ValueError for an unknown task and for a malformed entry.
    """
    for entry in entries:
        if not isinstance(entry, dict) or "task" not in entry or set(entry) - {"task", "path"}:
            raise ValueError(
                f"eval_data: {entry!r} must be a mapping such as {{task: gsm8k, path: test.jsonl.gz}}; "
                "path may be left out"
            )
    paths = {entry["task"]: entry.get("path") for entry in entries}
    wanted = names.split(",") if names else list(paths) or CHAT_CORE
    return [(get_task(name.strip()), paths.get(name.strip())) for name in wanted]


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Any],
    *,
    accelerator: Accelerator | None = None,
    options: ChatOptions | None = None,
) -> TaskResult:
    """Answer each of `rows`, by greedy generation or by the likeliest letter, and grade it. Every rank gets the result.

    Prompts of like length share a batch, and whole batches are dealt to the ranks of `accelerator`. So the batches, and
    with them the answers, do not depend on the number of processes. Raises ValueError if there are no rows, and if a
    row has no answer.
    """
    options = options or ChatOptions()
    if not len(rows):
        raise ValueError(f"task {task.name}: no rows to evaluate; raise the limit")
    conversations = [task.to_conversation(row) for row in rows]
    for number, conversation in enumerate(conversations):
        if [m["role"] for m in conversation["messages"][-2:]] != ["user", "assistant"]:
            raise ValueError(
                f"task {task.name}: row {number} does not end in a question and its answer; correct or remove it"
            )
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    if task.kind == "categorical":
        answer = _letters(model, tokenizer, [conversation["letters"] for conversation in conversations])
    else:
        answer = _generations(Engine(model, tokenizer), options.max_new_tokens)
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    batches = length_sorted_batches(prompts, options.batch_size)[rank::world]
    records: list[dict[str, Any]] = []
    threads = max(1, (os.cpu_count() or 1) // world)  # a grade may wait for a process that it started
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(batches, desc=task.name, unit="batch", disable=not options.progress) as bar,
    ):
        for batch in bar:
            texts = answer([prompts[i] for i in batch], batch)
            grades = pool.map(task.grade, [conversations[i] for i in batch], texts)
            for i, text, grade in zip(batch, texts, grades, strict=True):
                records.append(_record(task, i, conversations[i], text, bool(grade)))
            bar.set_postfix(accuracy=f"{sum(r['correct'] for r in records) / len(records):.1%}")
    records = sorted(gather_object(records) if world > 1 else records, key=lambda record: record["index"])
    return TaskResult(task.name, sum(record["correct"] for record in records), len(records), records)


def length_sorted_batches(prompts: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Group the prompts' numbers into batches of like length, the longest first: memory runs out at once or never.

    >>> length_sorted_batches([[1], [1, 2, 3], [1, 2]], 2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: dict[str, Any]) -> list[int]:
    """The ids of a conversation without its last answer.

    They take nanochat's form if the tokenizer has its special tokens, else the tokenizer's own chat template. Raises
    ValueError if it has none.
    """
    vocabulary = tokenizer.get_vocab()
    if all(token in vocabulary for token in SPECIAL_TOKENS):
        return render_prompt(tokenizer, conversation)
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; evaluate a chat model, or set tokenizer.chat_template and save it"
        )
    messages = conversation["messages"][:-1]
    encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return encoded["input_ids"]


def _record(task: Task, index: int, conversation: dict[str, Any], text: str, correct: bool) -> dict[str, Any]:
    question, expected = conversation["messages"][-2]["content"], answer_text(conversation)
    return {
        "index": index,
        "task": task.name,
        "question": question,
        "answer": text,
        "expected": expected,
        "correct": correct,
    }


def _generations(engine: Engine, max_new_tokens: int) -> Answer:
    # greedy completions
    return lambda prompts, _: [
        completion.text for (completion,) in engine.generate(prompts, max_new_tokens=max_new_tokens)
    ]


def _letters(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, letters: Sequence[Sequence[str]]) -> Answer:
    # of each prompt's letters, the one with the largest logit after it
    tokens = {
        letter: letter_token(tokenizer, letter) for letter in sorted({letter for row in letters for letter in row})
    }

    def choose(prompts: Sequence[Sequence[int]], batch: Sequence[int]) -> list[str]:
        rows = last_logits(model, prompts, tokenizer.pad_token_id or 0)
        return [
            letters[i][int(logits[[tokens[c] for c in letters[i]]].argmax())]
            for i, logits in zip(batch, rows, strict=True)
        ]

    return choose


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def last_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    """The logits (B, V) after the last id of each prompt.

    Prompts are padded with `pad` on the right, where causal attention does not look.
    """
    longest, rows = max(map(len, prompts)), torch.arange(len(prompts), device=model.device)
    ids = torch.tensor([[*p, *[pad] * (longest - len(p))] for p in prompts], device=model.device)  # (B, T)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    kept, place = ends.unique(return_inverse=True)  # few positions, because prompts of like length share a batch
    return model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[rows, place]


def letter_token(tokenizer: PreTrainedTokenizerBase, letter: str) -> int:
    """The token of an answer's letter. Raises ValueError if the tokenizer needs several."""
    ids = tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"the answer {letter!r} is {len(ids)} tokens in this tokenizer; "
            "categorical tasks need one: use another tokenizer"
        )
    return ids[0]


def chat_core(results: Sequence[tuple[TaskResult, float]]) -> float:
    """Mean of (accuracy − baseline) ÷ (1 − baseline) over results and their baselines: 0 is guessing, 1 perfect."""
    return sum((result.accuracy - baseline) / (1 - baseline) for result, baseline in results) / len(results)


def chat_core_stderr(results: Sequence[tuple[TaskResult, float]]) -> float:
    """Standard error of `chat_core`, from the standard errors of its tasks, which are independent."""
    return sum((result.stderr / (1 - baseline)) ** 2 for result, baseline in results) ** 0.5 / len(results)
