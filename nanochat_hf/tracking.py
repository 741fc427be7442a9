"""Numbers of a run: smoothed loss, throughput, the console's progress bar, metrics.jsonl and Accelerate's trackers."""

import json
from pathlib import Path

from tqdm import tqdm


class Ema:
    """Exponential moving average, debiased: Ema(0.9).update(3.0) → 3.0."""

    def __init__(self, beta=0.9):
        self.beta, self.value, self.weight = beta, 0.0, 0.0

    def update(self, x):
        """Take x in; returns the debiased average."""
        self.value = self.beta * self.value + (1 - self.beta) * x
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.value / self.weight


class MetricsFile:
    """Appends one JSON object a line to `path`; None writes nothing."""

    def __init__(self, path):
        self.path = Path(path) if path else None
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **values):
        """Append `values`."""
        if self.path:
            with self.path.open("a") as handle:
                handle.write(json.dumps(values) + "\n")


class Progress:
    """A tqdm bar on the main process: step, %, loss, tok/s, ETA."""

    def __init__(self, accelerator, total, initial, description):
        self.bar = tqdm(
            total=total, initial=initial, desc=description, unit="step", disable=not accelerator.is_main_process,
            dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip

    def update(self, step, **shown):
        """Move to `step` and show the given figures."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self):
        """Leave the bar as it is."""
        self.bar.close()
