"""Accuracy on tasks, by real generation."""

from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from ..conversation import render_prompt
from ..generation import Engine


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


def evaluate_task(model, tokenizer, task, rows, *, batch_size=64, max_new_tokens=256, progress=True):
    """Answer each of `rows`, greedily or by the likeliest letter, and grade it → TaskResult. ValueError when there are no rows."""
    if not len(rows):
        raise ValueError(f"task {task.name}: no rows to evaluate; raise the limit")
    if task.kind == "categorical":
        return evaluate_categorical(model, tokenizer, task, rows, batch_size=batch_size, progress=progress)
    engine, result = Engine(model, tokenizer), TaskResult(task.name, 0, len(rows))
    conversations = [task.to_conversation(row) for row in rows]
    with tqdm(total=len(rows), desc=task.name, unit="question", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            part = conversations[start : start + batch_size]
            completions = engine.generate([render_prompt(tokenizer, c) for c in part], max_new_tokens=max_new_tokens)
            for conversation, (completion,) in zip(part, completions, strict=True):
                right = bool(task.grade(conversation, completion.text))
                result.correct += right
                result.answers.append({"question": conversation["messages"][-2]["content"], "answer": completion.text, "correct": right})
            bar.update(len(part))
            bar.set_postfix(accuracy=f"{result.correct / len(result.answers):.1%}")
    return result


@torch.no_grad()  # not inference_mode, which XLA tensors refuse
def evaluate_categorical(model, tokenizer, task, rows, *, batch_size=64, progress=True):
    """Choose the letter with the largest logit at the end of each prompt → TaskResult; prompts of like length share a batch."""
    conversations = [task.to_conversation(row) for row in rows]
    prompts = [render_prompt(tokenizer, conversation) for conversation in conversations]
    chosen, result = {}, TaskResult(task.name, 0, len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))  # the longest first: memory runs out at once or never
    for start in tqdm(range(0, len(order), batch_size), desc=task.name, unit="batch", disable=not progress):
        part = order[start : start + batch_size]
        longest = len(prompts[part[0]])
        # padded behind, where causal attention never looks from the prompt's last token
        ids = torch.tensor([prompts[i] + [tokenizer.pad_token_id] * (longest - len(prompts[i])) for i in part], device=model.device)
        last = torch.tensor([len(prompts[i]) - 1 for i in part], device=model.device)
        hidden = model.model(ids, use_cache=False).last_hidden_state[torch.arange(len(part), device=model.device), last]
        for i, logits in zip(part, model.logits(hidden), strict=True):
            letters = conversations[i]["letters"]
            tokens = [letter_token(tokenizer, letter) for letter in letters]
            chosen[i] = letters[int(logits[tokens].argmax())]
    for i, conversation in enumerate(conversations):
        right = bool(task.grade(conversation, chosen[i]))
        result.correct += right
        result.answers.append({"question": conversation["messages"][-2]["content"], "answer": chosen[i], "correct": right})
    return result


def letter_token(tokenizer, letter):
    """The one token of an answer's letter; ValueError where the tokenizer needs several."""
    ids = tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"the answer {letter!r} is {len(ids)} tokens in this tokenizer; categorical tasks need one: use another tokenizer")
    return ids[0]


def chat_core(results):
    """Mean of (accuracy − baseline) ÷ (1 − baseline) over [(TaskResult, baseline)]: 0 is guessing, 1 is perfect."""
    return sum((result.accuracy - baseline) / (1 - baseline) for result, baseline in results) / len(results)
