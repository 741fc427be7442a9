"""How the residual scalars should start: final bits per byte of several rules, over seeds, at one depth and batch.

At the first step the gradients of the residual scalars are rounding noise, and AdamW makes a full learning rate of
their sign. Each rule below is one way not to. Two phases, since the machine that trains may lack the packages that read
data: python -m scripts.experiments.scalar_start --phase tokens --data 'text/*.parquet' --tokenizer DIR --output
runs/scalars python -m scripts.experiments.scalar_start --phase train --output runs/scalars --runs
none:0,none:7,hold20:0,hold20:7
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from nanochat_hf import NanochatForCausalLM, kernels, scaling
from nanochat_hf.config import parse, user_errors
from nanochat_hf.data.packing import pack_text
from nanochat_hf.evals.bpb import evaluate_bpb
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine.accelerator import build_accelerator, on_cuda
from nanochat_hf.machine.attention import choose_attention, set_attention
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, apply_schedule, build_param_groups
from nanochat_hf.tokenizer import load_tokenizer, token_bytes
from nanochat_hf.training.schedules import falling, lr_multiplier, muon_momentum
from nanochat_hf.training.trainer import Trainer, TrainState

SCALARS = ("resid_lambdas", "x0_lambdas")
WINDOW = 512  # documents that are packed together, as TextBatches does


def held(steps):
    """Scalars keep still for so many steps."""
    return lambda step: float(step >= steps)


def warmed(steps):
    """Their rate rises linearly over so many steps."""
    return lambda step: min(1.0, (step + 1) / steps)


def held_then_warmed(still, steps):
    """Still first, then a linear rise."""
    return lambda step: min(1.0, max(0, step + 1 - still) / steps)


# name: (factor of the scalars' rate by step, factor of everybody's, eps of the scalars' AdamW)
RULES = {
    "none": (held(0), held(0), None),
    "hold20": (held(20), held(0), None),
    "hold50": (held(50), held(0), None),
    "hold100": (held(100), held(0), None),
    "warm40": (warmed(40), held(0), None),
    "warm100": (warmed(100), held(0), None),
    "warm200": (warmed(200), held(0), None),
    "hold20warm80": (held_then_warmed(20, 80), held(0), None),
    "hold50warm100": (held_then_warmed(50, 100), held(0), None),
    "warmall40": (held(0), warmed(40), None),
    "eps1e-5": (held(0), held(0), 1e-5),
    "eps1e-4": (held(0), held(0), 1e-4),
    "hold400": (held(400), held(0), None),
}


@dataclass(frozen=True)
class ScalarConfig:
    """What to train, and which rules to compare."""

    output: str = field(metadata={"help": "folder of the tokens and of results.jsonl"})
    phase: str = field(default="train", metadata={"help": "tokens: tokenise --data; train: run the rules"})
    data: str | None = field(default=None, metadata={"help": "parquet files of text; the last one is for validation"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder of the tokenizer"})
    runs: str = field(default="none:0", metadata={"help": "rule:seed pairs, comma-separated"})
    depth: int = field(default=12, metadata={"help": "layers"})
    rows: int = field(default=32, metadata={"help": "rows of a micro-batch"})
    total_batch_size: int = field(default=65536, metadata={"help": "tokens of a step"})
    num_steps: int = field(default=400, metadata={"help": "optimizer steps of each run"})
    validation_batches: int = field(default=8, metadata={"help": "micro-batches of validation"})
    max_seconds: float = field(default=1e9, metadata={"help": "begin no further run after so long"})
    isolate: bool = field(default=True, metadata={"help": "documents of a row cannot attend to each other"})


def tokens(config):
    """Tokenise every file of --data → train.npz, validation.npz {ids uint16, lengths int32}, token_bytes.npy."""
    import pyarrow.parquet as pq

    tokenizer, output = load_tokenizer(config.tokenizer), Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "token_bytes.npy", token_bytes(tokenizer).numpy().astype(np.int16))
    bos, files = tokenizer.bos_token_id, sorted(Path().glob(config.data))
    for name, part in (("train", files[:-1]), ("validation", files[-1:])):
        documents = []
        for file in part:
            for batch in pq.ParquetFile(file).iter_batches(columns=["text"], batch_size=256):
                encoded = tokenizer.backend_tokenizer.encode_batch(
                    batch.column(0).to_pylist(), add_special_tokens=False
                )
                documents += [np.array([bos, *e.ids], dtype=np.uint16) for e in encoded]
        lengths = np.array([len(d) for d in documents], dtype=np.int32)
        np.savez(output / f"{name}.npz", ids=np.concatenate(documents), lengths=lengths)
        print(f"{name}: {len(documents):,} documents, {lengths.sum():,} tokens", flush=True)


class Packed:
    """Endless micro-batches (B, T) of tokenised documents in full rows, shuffled anew each epoch by the seed."""

    epoch = 0.0

    def __init__(self, path, rows, positions, seed, isolate=True):
        with np.load(path) as file:
            ids, lengths = file["ids"].astype(np.int64), file["lengths"]
        ends = np.cumsum(lengths)
        self.documents = [ids[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        self.bos, self.rows, self.positions, self.seed, self.isolate = int(ids[0]), rows, positions, seed, isolate

    def _packed(self):
        generator, waiting = np.random.default_rng(self.seed), []
        while True:
            order = generator.permutation(len(self.documents))
            for start in range(0, len(order), WINDOW):
                window = [self.documents[i] for i in order[start : start + WINDOW]]
                packed, waiting = pack_text([*waiting, *window], self.positions + 1, "crop", self.bos)
                yield from (packed[i] for i in generator.permutation(len(packed)))

    def __iter__(self):
        batch = []
        for row in self._packed():
            batch.append(row)
            if len(batch) == self.rows:
                yield self._collate(batch)
                batch = []

    def _collate(self, batch):
        ids = torch.from_numpy(np.stack([np.concatenate(row) for row in batch]))
        result = {"input_ids": ids[:, :-1].contiguous(), "shift_labels": ids[:, 1:].contiguous()}
        if self.isolate:
            places = [np.concatenate([np.arange(len(d)) for d in row])[:-1] for row in batch]
            result["position_ids"] = torch.from_numpy(np.stack(places))
        return result


def train(config):
    """Run every rule:seed pair → a line of results.jsonl each."""
    accumulation = scaling.accumulation_steps(config.total_batch_size, config.rows, 2048, 1)
    accelerator = build_accelerator(accumulation, dtype="bfloat16" if on_cuda() else None, compile=on_cuda())
    device, output, began = accelerator.device, Path(config.output), time.perf_counter()
    sizes = torch.from_numpy(np.load(output / "token_bytes.npy").astype(np.int64))
    shape = scaling.model_config(config.depth, len(sizes), 2048)
    with device:
        model = NanochatForCausalLM(shape)
    attention, _ = choose_attention(device, cudnn=cudnn_attention)
    set_attention(model, attention)
    if kernels.available(device)[0]:
        model.model.training_ops, _ = kernels.choose(model, device, torch.bfloat16)
    held_out = iter(Packed(output / "validation.npz", config.rows, 2048, 1, config.isolate))
    validation = [next(held_out) for _ in range(config.validation_batches)]
    trainer = None
    for pair in config.runs.split(","):
        if time.perf_counter() - began > config.max_seconds:
            print(f"no time for {pair} and what follows", flush=True)
            return
        name, seed = pair.split(":")
        optimizer, schedule = prepared(config, model, RULES[name], int(seed))
        batches = Packed(output / "train.npz", config.rows, 2048, int(seed), config.isolate)
        if trainer is None:
            trainer = Trainer(accelerator, model, optimizer, batches, num_steps=config.num_steps, schedule=schedule)
        else:  # the compiled model stays, with new weights
            trainer.optimizer, trainer.batches = accelerator.prepare_optimizer(optimizer), batches
            trainer.schedule, trainer.state = schedule, TrainState()
        losses, start = [], time.perf_counter()
        losses, start = [], time.perf_counter()
        trainer.callbacks = [lambda trainer, info, losses=losses: losses.append(info.loss)]
        trainer.fit()
        result = {
            "rule": name, "seed": int(seed), "depth": config.depth, "tokens_per_step": config.total_batch_size,
            "steps": config.num_steps, "bpb": evaluate_bpb(model.eval(), validation, sizes),
            "train_loss_last_20": torch.stack(losses[-20:]).mean().item(),
            "train_loss": [round(loss.item(), 4) for loss in losses[:: max(1, len(losses) // 40)]],
            **{group: getattr(model.model, group).tolist() for group in SCALARS},
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        with open(output / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        print({key: value for key, value in result.items() if key != "train_loss"}, flush=True)


def prepared(config, model, rule, seed):
    """(optimizer, schedule) of a run: the model gets new weights by its seed, the groups the rule's factors."""
    scalar_factor, common_factor, eps = rule
    torch.manual_seed(seed)
    with model.device:
        fresh = NanochatForCausalLM(model.config)
    with torch.no_grad():
        for own, new in zip(model.parameters(), fresh.parameters(), strict=True):
            own.copy_(new)
    model.zero_grad()
    rates = OptimizerConfig(
        weight_decay=scaling.base_weight_decay(config.depth, 0.2),
        batch_lr_scale=scaling.batch_lr_scale(config.total_batch_size),
    )
    optimizer = MuonAdamW(build_param_groups(model, rates))
    for group in optimizer.param_groups:
        if eps and group["name"] in SCALARS:
            group["eps"] = eps

    def schedule(wrapped, step):
        multiplier = lr_multiplier(step, config.num_steps, warmdown_ratio=0.5) * common_factor(step)
        apply_schedule(wrapped.optimizer, multiplier, muon_momentum(step), falling(step, config.num_steps))
        for group in wrapped.optimizer.param_groups:  # looked up here, since Accelerate's prepare makes new ones
            if group["name"] in SCALARS:
                group["lr"] *= scalar_factor(step)
        return multiplier

    return optimizer, schedule


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the trainings, and write what they show."""
    config, _ = parse([ScalarConfig], argv, description=__doc__)
    {"tokens": tokens, "train": train}[config.phase](config)


if __name__ == "__main__":
    main()
