"""Checkpoints: written whole to a temporary folder, renamed, then pruned; a folder with the final name is complete."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch

NAME = re.compile(r"checkpoint-(\d{6,})$")


def checkpoints(output_dir):
    """Whole checkpoints in `output_dir`, oldest first: [Path('…/checkpoint-000010'), …]."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if NAME.search(p.name) and (p / "trainer.json").is_file()]
    return sorted(found, key=lambda p: int(NAME.search(p.name)[1]))


def resolve(output_dir, resume):
    """`resume`: None → None; "auto" → the newest whole checkpoint or None; a folder → itself, ValueError if it is none."""
    if resume is None:
        return None
    if resume == "auto":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    if not (Path(resume) / "trainer.json").is_file():
        raise ValueError(f"--resume {resume}: no trainer.json there, so no whole checkpoint; give a checkpoint-NNNNNN folder or auto")
    return Path(resume)


def save(trainer, output_dir, tokenizer, settings, keep=2):
    """Write `output_dir/checkpoint-{step}`, all ranks together; then prune to the newest `keep` (0 keeps all). Returns the folder."""
    accelerator, step = trainer.accelerator, trainer.state.step
    final = Path(output_dir) / f"checkpoint-{step:06d}"
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    rank = accelerator.process_index
    optimizer = trainer.optimizer.optimizer.state_dict()  # a collective where the state is sharded
    torch.save({"optimizer": optimizer, "data": trainer.batches.state_dict(), "rng": rng_state()}, partial / f"rank{rank}.pt")
    if accelerator.is_main_process:
        trainer.raw_model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        state = {"state": trainer.state_dict(), "num_processes": accelerator.num_processes, "settings": settings}
        (partial / "trainer.json").write_text(json.dumps(state, indent=2, default=str))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in partial.iterdir():
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _fsync(final.parent)
        for old in checkpoints(output_dir)[:-keep] if keep else ():
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load(trainer, folder):
    """Restore weights, optimizer, data position, generators and counters, exactly."""
    from safetensors.torch import load_file

    saved = json.loads((folder / "trainer.json").read_text())
    accelerator = trainer.accelerator
    if saved["num_processes"] != accelerator.num_processes:
        raise ValueError(
            f"--resume {folder}: written by {saved['num_processes']} processes, this run has {accelerator.num_processes}; "
            "launch with the same number"
        )
    weights = {}
    for part in sorted(folder.glob("*.safetensors")):
        weights |= load_file(part)
    own = {name: (tuple(value.shape)) for name, value in trainer.raw_model.state_dict().items()}
    differing = sorted(n for n in own.keys() | weights.keys() if n not in own or n not in weights or own[n] != tuple(weights[n].shape))
    if differing:
        raise ValueError(f"--resume {folder}: another architecture; {differing[0]} and {len(differing) - 1} more tensors differ")
    trainer.raw_model.load_state_dict(weights)
    rank = torch.load(folder / f"rank{accelerator.process_index}.pt", weights_only=False, map_location="cpu")
    trainer.optimizer.optimizer.load_state_dict(rank["optimizer"])
    trainer.batches.load_state_dict(rank["data"])
    trainer.load_state_dict(saved["state"])
    set_rng_state(rank["rng"])


def export(model, tokenizer, folder):
    """Write a model folder that `from_pretrained` loads, whole or not at all."""
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return folder


def rng_state():
    """States of Python's, numpy's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):
    """Undo `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prepare_folder(path):
    """Make the output folder and prove that it can be written to; returns its Path. OSError where it cannot."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".writable"
    probe.touch()
    probe.unlink()
    return folder
