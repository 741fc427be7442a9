"""Accuracy on tasks, by real generation or by the likeliest letter, over all ranks; ChatCORE."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from ..conversation import SPECIAL_TOKENS, render_prompt
from ..generation import Engine
from ..tasks.base import answer_text

CHAT_CORE = ("mmlu", "arc_easy", "arc_challenge", "gsm8k", "humaneval", "spelling_bee")


@dataclass
class TaskResult:
    """Accuracy of a task over `total` rows, with its binomial standard error and every answer."""

    name: str
    correct: int
    total: int
    answers: list = field(default_factory=list)

    @property
    def accuracy(self):
        """correct ÷ total."""
        return self.correct / self.total

    @property
    def stderr(self):
        """√(p(1 − p)/n)."""
        return (self.accuracy * (1 - self.accuracy) / self.total) ** 0.5


def evaluation_rows(task, path=None, limit=None):
    """Held-out rows: all, or `limit` of them evenly spaced, since files are sorted by subject; generated tasks make as many as asked."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1; leave it out for all rows")
    rows = task.load("test", path=path)
    if limit is not None and len(rows) < limit:
        rows = task.load("test", path=path, limit=limit)
    if limit is None or len(rows) <= limit:
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def evaluate_task(model, tokenizer, task, rows, *, accelerator=None, batch_size=64, max_new_tokens=512, progress=True):
    """Answer each of `rows`, greedily or by the likeliest letter, and grade it → TaskResult, the same on every rank.

    Prompts of like length share a batch, and whole batches are dealt to the ranks of `accelerator`: the batches, and so the answers, do
    not depend on the number of processes. Each answer is {index, task, question, answer, expected, correct}. ValueError when there
    are no rows or one has no answer.
    """
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
        answer = _generations(Engine(model, tokenizer), max_new_tokens)
    world, rank = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    batches, records = length_sorted_batches(prompts, batch_size)[rank::world], []
    # threads, for a grade may wait for a process of its own
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world)) as pool:
        with tqdm(batches, desc=task.name, unit="batch", disable=not progress) as bar:
            for batch in bar:
                texts = answer([prompts[i] for i in batch], batch)
                grades = pool.map(task.grade, [conversations[i] for i in batch], texts)
                records += [
                    _record(task, i, conversations[i], t, bool(g)) for i, t, g in zip(batch, texts, grades, strict=True)
                ]
                bar.set_postfix(accuracy=f"{sum(r['correct'] for r in records) / len(records):.1%}")
    records = sorted(gather_object(records) if world > 1 else records, key=lambda record: record["index"])
    return TaskResult(task.name, sum(record["correct"] for record in records), len(records), records)


def length_sorted_batches(prompts, batch_size):
    """Numbers of prompts of like length, the longest first: memory runs out at once or never.

    length_sorted_batches([[1], [1, 2, 3], [1, 2]], 2) → [[1, 2], [0]]
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def prompt_ids(tokenizer, conversation):
    """The prompt in nanochat's form where the tokenizer has its special tokens, else by its own chat template; ValueError without one."""
    vocabulary = tokenizer.get_vocab()
    if all(token in vocabulary for token in SPECIAL_TOKENS):
        return render_prompt(tokenizer, conversation)
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; evaluate a chat model, or set tokenizer.chat_template and save it"
        )
    return tokenizer.apply_chat_template(conversation["messages"][:-1], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


def _record(task, index, conversation, text, correct):
    question, expected = conversation["messages"][-2]["content"], answer_text(conversation)
    return {
        "index": index,
        "task": task.name,
        "question": question,
        "answer": text,
        "expected": expected,
        "correct": correct,
    }


def _generations(engine, max_new_tokens):
    """(prompts, their numbers) → greedy completions as text."""
    return lambda prompts, batch: [
        completion.text for (completion,) in engine.generate(prompts, max_new_tokens=max_new_tokens)
    ]


def _letters(model, tokenizer, letters):
    """(prompts, their numbers) → of each prompt's letters the one with the largest logit at its end."""
    tokens = {
        letter: letter_token(tokenizer, letter) for letter in sorted({letter for row in letters for letter in row})
    }

    def choose(prompts, batch):
        rows = last_logits(model, prompts, tokenizer.pad_token_id or 0)
        return [
            letters[i][int(logits[[tokens[c] for c in letters[i]]].argmax())]
            for i, logits in zip(batch, rows, strict=True)
        ]

    return choose


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def last_logits(model, prompts, pad):
    """Lists of ids → (B, V) logits behind the last id of each. Padded behind, where causal attention never looks from there."""
    longest, rows = max(map(len, prompts)), torch.arange(len(prompts), device=model.device)
    ids = torch.tensor([prompt + [pad] * (longest - len(prompt)) for prompt in prompts], device=model.device)  # (B, T)
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    kept, place = ends.unique(return_inverse=True)  # like lengths share a batch, so these positions are few
    return model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[rows, place]


def letter_token(tokenizer, letter):
    """The one token of an answer's letter; ValueError where the tokenizer needs several."""
    ids = tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(
            f"the answer {letter!r} is {len(ids)} tokens in this tokenizer; categorical tasks need one: use another tokenizer"
        )
    return ids[0]


def chat_core(results):
    """Mean of (accuracy − baseline) ÷ (1 − baseline) over [(TaskResult, baseline)]: 0 is guessing, 1 is perfect."""
    return sum((result.accuracy - baseline) / (1 - baseline) for result, baseline in results) / len(results)


def chat_core_stderr(results):
    """Standard error of `chat_core`, from those of the tasks, which are independent."""
    return sum((result.stderr / (1 - baseline)) ** 2 for result, baseline in results) ** 0.5 / len(results)
