"""Two checkouts train on one GPU in turns, so that both see the same clocks: start it in both at one time.

PYTHONPATH=OLD python scripts/benchmarks/turns.py old new --folder /tmp/turns --depth 12 --rows 64 &
PYTHONPATH=NEW python scripts/benchmarks/turns.py new old --folder /tmp/turns --depth 12 --rows 64
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from nanochat_hf import NanochatForCausalLM, kernels
from nanochat_hf.kernels.lib import cudnn_attention
from nanochat_hf.machine.accelerator import build_accelerator
from nanochat_hf.machine.attention import choose_attention, set_attention
from nanochat_hf.optim import MuonAdamW, apply_schedule, build_param_groups
from nanochat_hf.scaling import accumulation_steps, model_config
from nanochat_hf.training.schedules import muon_momentum
from nanochat_hf.training.trainer import Trainer
from scripts.benchmarks.train import RandomTokens

FIRST = 3  # steps before the first turn: compilation, and the allocator's growth


class Turns:
    """A callback that lets the other process train after every `steps` steps; they meet by files in a folder."""

    def __init__(self, args):
        self.args, self.folder, self.leads = args, Path(args.folder), args.name < args.other
        self.seconds, self.losses, self.begin = [], [], 0.0

    def wait(self, name):
        """Until the other process has written the file."""
        limit = time.time() + 600
        while not (self.folder / name).exists():
            if time.time() > limit:
                sys.exit(f"{self.args.other} has not come to {name} within ten minutes")
            time.sleep(0.01)

    def __call__(self, trainer, info):
        """After a step: note the time where a turn ends, and wait for the next turn."""
        self.losses.append(float(info.loss) if info.step <= FIRST + 1 else None)
        turn, within = divmod(info.step - FIRST, self.args.steps)
        if turn < 0 or within:
            return
        torch.cuda.synchronize()
        if turn:
            self.seconds.append((time.perf_counter() - self.begin) / self.args.steps)
        (self.folder / f"{self.args.name}-{turn}").touch()
        if turn < self.args.turns:
            self.wait(f"{self.args.other}-{turn if self.leads else turn + 1}")
        torch.cuda.synchronize()
        self.begin = time.perf_counter()


def model_for(args, device):
    """A model of the depth, with attention and kernels as a run would choose them."""
    with device:
        model = NanochatForCausalLM(model_config(args.depth, 32768, args.positions))
    set_attention(model, choose_attention(device, "auto", cudnn=cudnn_attention)[0])
    model.model.training_ops, report = kernels.choose(model, device, torch.bfloat16)
    print("\n".join(kernels.table(report)), flush=True)
    return model


def schedule(wrapped, step):
    """Constant rates, none for the residual scalars: their first gradients are rounding, and would part the runs."""
    apply_schedule(wrapped.optimizer, 1.0, muon_momentum(step))
    for group in wrapped.optimizer.param_groups:
        group["lr"] *= "lambdas" not in group["name"]
    return 1.0


def main(argv=None):
    """Train, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of this process")
    parser.add_argument("other", help="of the other one")
    parser.add_argument("--folder", required=True, help="an empty folder that both see")
    parser.add_argument("--depth", type=int, default=12, help="layers")
    parser.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    parser.add_argument("--positions", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--total-batch-size", type=int, default=524288, help="tokens of an optimizer step")
    parser.add_argument("--turns", type=int, default=3, help="turns of each process")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn")
    args = parser.parse_args(argv)
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    accumulation = accumulation_steps(args.total_batch_size, args.rows, args.positions, 1)
    accelerator = build_accelerator(accumulation, dtype="bfloat16", compile=True)
    torch.manual_seed(0)
    model, turns = model_for(args, accelerator.device), Turns(args)
    batches = RandomTokens(32768, args.rows, args.positions, 0, True)
    optimizer, steps = MuonAdamW(build_param_groups(model)), FIRST + args.turns * args.steps
    Trainer(accelerator, model, optimizer, batches, num_steps=steps, schedule=schedule, callbacks=[turns]).fit()
    figures = {"name": args.name, "depth": args.depth, "rows": args.rows}
    figures["tok/s"] = [round(args.total_batch_size / seconds) for seconds in turns.seconds]
    figures["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    print(json.dumps(figures | {"losses": [round(loss, 5) for loss in turns.losses if loss is not None]}))


if __name__ == "__main__":
    main()
