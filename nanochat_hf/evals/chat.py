"""Accuracy on tasks, by real generation."""

from dataclasses import dataclass, field

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
    """Answer each of `rows` greedily, grade it → TaskResult. ValueError when there are no rows."""
    if not len(rows):
        raise ValueError(f"task {task.name}: no rows to evaluate; raise the limit")
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
