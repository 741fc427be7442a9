"""Reinforcement learning's own numbers in the log, and the newest answers in samples.md and the trackers."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_hf.machine.accelerator import sum_over_ranks
from nanochat_hf.machine.durable import write_whole
from nanochat_hf.rl.answers import Answer
from nanochat_hf.rl.rollouts import Drawn, RolloutBatches
from nanochat_hf.training.tracking import say
from nanochat_hf.training.trainer import TrainState

from .base import Callback, due

if TYPE_CHECKING:
    from nanochat_hf.training.trainer import StepInfo, Trainer

SHOWN = 8  # answers in samples.md and in the trackers' table
COLUMNS = ["step", "question", "answer", "reward", "finished"]


class Reinforced(Callback):
    """The log's `Measures` of a run on its own answers, and a table of answers every `every` steps and at the end."""

    name = "reinforced"

    def __init__(self, batches: RolloutBatches, every: int, output_dir: str | None = None) -> None:
        self.batches, self.every, self.output_dir = batches, every, output_dir
        self.drawn: Drawn | None = None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.before = TrainState()  # at the last log entry
        batches.seen.append(self._see)

    def _see(self, drawn):
        self.drawn = drawn

    def state_dict(self) -> dict[str, Any]:
        """The rewards that the report compares, and where the last log entry was."""
        return {"first": self.first, "last": self.last, "before": asdict(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state_dict."""
        self.first, self.last = dict(state["first"]), dict(state["last"])
        self.before = TrainState(**state["before"])

    def values(self, trainer: "Trainer") -> dict[str, float]:
        """The numbers since the last log entry."""
        accelerator, state = trainer.accelerator, trainer.state
        found = self.batches.metrics.values(sum_over_ranks(accelerator), accelerator.num_processes)
        steps = max(1, state.step - self.before.step)
        updating = (state.seconds - self.before.seconds) / steps
        found["step_time"] = updating + found.get("rollout/seconds", 0.0)
        if updating:
            found["update/tokens_per_second"] = (state.tokens - self.before.tokens) / steps / updating
        self.before = replace(state)
        if warning := self.batches.watch.warning(found.get("entropy")):
            say(accelerator, f"step {state.step}: {warning}")
        self.last = {name: found[name] for name in ("reward", "completions/clipped_ratio") if name in found}
        self.first = self.first or self.last
        return found

    def shown(self, values: Mapping[str, float]) -> dict[str, str]:
        """Reward and length for the progress bar."""
        names = {"reward": "reward", "completions/mean_length": "length"}
        return {short: f"{values[name]:.3g}" for name, short in names.items() if name in values}

    def figures(self) -> dict[str, Any]:
        """Rewards for the report."""
        first, last = self.first.get("reward"), self.last.get("reward")
        return {} if first is None or last is None else {"reward at first": first, "reward at last": last}

    def __call__(self, trainer: "Trainer", info: "StepInfo") -> None:
        """Write the table where it is due."""
        if self.drawn is None or not (due(info.step, self.every) or info.step == trainer.num_steps):
            return
        chosen = [(group.index, group.answers[0]) for group in self.drawn.groups[:SHOWN]]
        rows = [[info.step, *self._shown(index, answer)] for index, answer in chosen]
        if trainer.accelerator.is_main_process and self.output_dir:
            write_whole(Path(self.output_dir, "samples.md"), table(rows))
        for tracker in trainer.accelerator.trackers:
            if hasattr(tracker, "log_table"):
                tracker.log_table("samples", columns=COLUMNS, data=rows, step=info.step)

    def _shown(self, index: int, answer: Answer) -> list[Any]:
        question = self.batches.questions[index].conversation["messages"][-2]["content"]
        text = question if isinstance(question, str) else "".join(part["text"] for part in question)
        return [text, answer.text, answer.reward, answer.finished]


def table(rows: list[list[Any]]) -> str:
    """Answers as a table in Markdown, a line each.

    >>> print(table([[10, "1+1?", "#### 2", 1.0, True]]), end="")
    | step | question | answer | reward | finished |
    |---|---|---|---|---|
    | 10 | 1+1? | #### 2 | 1 | yes |
    """
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for step, question, answer, reward, finished in rows:
        texts = (_cell(question), _cell(answer), f"{reward:.3g}", "yes" if finished else "no")
        lines.append(f"| {step} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ⏎ ")
