"""The optimizer's step on random gradients.

python -m scripts.bench optimizer --depth 12 --depth 20

With --ranks 1 --ranks 2 --ranks 4 the memory of its state on each of so many CPU processes instead.
"""

import argparse
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat_hf import NanochatForCausalLM
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.scaling import model_config
from scripts.benchmarks.measure import median_ms, report


class Both:
    """torch.optim.Muon for the matrices and fused AdamW for the rest, stepped together: what torch itself offers."""

    def __init__(self, groups, device):
        matrices = [p for g in groups if g["kind"] == "muon" for p in g["params"]]
        others = [p for g in groups if g["kind"] == "adamw" for p in g["params"]]
        self.parts = (
            torch.optim.Muon(matrices, lr=0.02),
            torch.optim.AdamW(others, lr=0.01, fused=device.type == "cuda"),
        )

    def step(self) -> None:
        """Step both."""
        for part in self.parts:
            part.step()

    @property
    def state(self) -> dict:
        """The states of both."""
        return {k: v for part in self.parts for k, v in part.state.items()}


def state_bytes(optimizer):
    """Bytes of all state tensors."""
    return sum(
        v.numel() * v.element_size()
        for values in optimizer.state.values()
        for v in values.values()
        if torch.is_tensor(v)
    )


def measure(depth, name, build, device, args):
    """One optimizer on one model → a dict of figures."""
    with device:
        model = NanochatForCausalLM(model_config(depth, args.vocab_size))
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, device=device) * 1e-3
    groups = build_param_groups(model)
    optimizer = build(groups)
    if device.type == "cuda":
        optimizer.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(optimizer.step, device, warmup=3, repeats=args.repeats, inner=args.inner)
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else float("nan")
    row = {
        "depth": depth,
        "optimizer": name,
        "ms": ms,
        "state GiB": state_bytes(optimizer) / 2**30,
        "temporary GiB": extra,
    }
    del model, optimizer, groups
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def share(rank, world, folder, depth, vocab_size):
    """One step on one of `world` processes; writes the bytes of the state that it holds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model = NanochatForCausalLM(model_config(depth, vocab_size))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = MuonAdamW(build_param_groups(model))
    optimizer.step()
    Path(folder, f"{rank}.bytes").write_text(str(state_bytes(optimizer)))
    dist.destroy_process_group()


def shares(depth, world, vocab_size):
    """The state's memory on `world` processes → a dict of figures."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(share, args=(world, folder, depth, vocab_size), nprocs=world, start_method="forkserver")
        held = [int(Path(folder, f"{rank}.bytes").read_text()) / 2**20 for rank in range(world)]
    return {"depth": depth, "processes": world, "most MiB": max(held), "least MiB": min(held), "all MiB": sum(held)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench optimizer", description=__doc__)
    parser.add_argument(
        "--depth", type=int, action="append", help="layers of the model whose parameters are stepped (default 4)"
    )
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens in the vocabulary")
    parser.add_argument("--repeats", type=int, default=7, help="timings, of which the median counts")
    parser.add_argument("--inner", type=int, default=5, help="steps in a timing")
    parser.add_argument(
        "--ranks", type=int, action="append", help="measure the state's memory on so many CPU processes, nothing else"
    )
    parser.add_argument("--json", help="also write the figures there")
    args = parser.parse_args(argv)
    if args.ranks:
        report(
            [shares(depth, world, args.vocab_size) for depth in args.depth or [4] for world in args.ranks], args.json
        )
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = {"MuonAdamW": lambda groups: MuonAdamW(groups)}
    if hasattr(torch.optim, "Muon"):
        kinds["torch Muon + fused AdamW"] = lambda groups: Both(groups, device)
    rows = [measure(depth, name, build, device, args) for depth in args.depth or [4] for name, build in kinds.items()]
    report(rows, args.json)


if __name__ == "__main__":
    main()
