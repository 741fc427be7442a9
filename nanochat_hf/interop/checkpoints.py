"""Checkpoints of the original nanochat, of any date ↔ model folders of ours.

The architectures are the same. They differ in the names of the weights, the dtype of the tables, and the files.
Float32 holds every bfloat16 value, and `nanochat.json` in the model folder keeps what else the checkpoint had. So a
checkpoint that is imported and exported again is the same, bit for bit.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerFast

from nanochat_hf.interop.folder import export
from nanochat_hf.recipes import ARCHITECTURES

from ..model import NanochatConfig, NanochatForCausalLM
from ..tokenizer import load_tokenizer
from .checkpoint_files import find_tokenizer, newest, read_json, read_weights
from .dates import Origin, origin_of
from .encoding import read_encoding, tokenizer_from_encoding, write_encoding
from .fields import ROUNDED, config_from_nanochat, config_to_nanochat
from .from_transformers import model_from_transformers
from .names import (
    OLD_LAMBDAS,
    Weights,
    empty_model,
    is_table,
    name_to_nanochat,
    weights_from_nanochat,
    weights_to_nanochat,
)
from .probe import losses_by_cap

RECORD = "nanochat.json"
FINE_TUNED = ("init_lr_frac", "chatcore_every", "dry_run", "model_tag")  # flags of nanochat's fine-tuning


@dataclass(frozen=True)
class Decisions:
    """What the user says of a checkpoint that its files may leave open.

    `recipe`: of which date it is; `probe`: a text, or its file, on which the losses are compared; `sequence_len`: the
    one that the windows were trained with. `say` gets the lines about what was found and assumed.
    """

    recipe: str | None = None
    probe: str | None = None
    sequence_len: int | None = None
    say: Callable[[str], None] = print


def import_checkpoint(
    checkpoint_dir: str | Path,
    output: str | Path,
    step: int | None = None,
    tokenizer_dir: str | Path | None = None,
    decisions: Decisions | None = None,
) -> tuple[NanochatForCausalLM, PreTrainedTokenizerFast]:
    """Write the model folder `output` from a checkpoint; returns the model and the tokenizer.

    The checkpoint is `checkpoint_dir/model_{step}.pt`, its meta file, and a tokenizer.pkl. `step` defaults to the
    newest. The tokenizer is looked for beside the weights, then where nanochat keeps it: ../../tokenizer. A folder of
    transformers' own NanoChat (config.json, safetensors, tokenizer) can be imported too, and has no steps.

    Raises ValueError where a file is missing or damaged, where files do not fit each other, and where `output` already
    holds something.
    """
    output, decisions = Path(output), decisions or Decisions()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} already holds something; name a new folder")
    folder = Path(checkpoint_dir)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"--step {step}: {folder} is a folder of transformers, which has no steps; leave it out")
        model, tokenizer = model_from_transformers(folder, tokenizer_dir)
        _write(model, tokenizer, output)
        return model.eval(), tokenizer
    step = newest(folder) if step is None else step
    meta = read_json(folder / f"meta_{step:06d}.json")
    stored = read_weights(folder / f"model_{step:06d}.pt")
    origin, fields = origin_of(stored, meta, decisions.recipe), meta.get("model_config")
    config = config_from_nanochat(fields, stored, origin.name, decisions.sequence_len)
    weights = weights_from_nanochat(stored, config)
    encoding = read_encoding(find_tokenizer(folder, tokenizer_dir))
    tokenizer = tokenizer_from_encoding(encoding, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "give the one it was trained with"
        )
    model = empty_model(config)
    model.load_state_dict(weights, assign=True)
    model.eval()
    if decisions.probe is not None:
        origin = _probed(origin, model, tokenizer, decisions)
    decisions.say(origin.told())
    if decisions.sequence_len is None and "sliding_attention" in config.layer_types:
        _say_whose_windows(folder, meta, config, decisions.say)
    _write(model, tokenizer, output)
    dtypes = {n: str(v.dtype).removeprefix("torch.") for n, v in stored.items() if v.dtype != torch.float32}
    absent = [n for n in OLD_LAMBDAS if n not in stored]
    record = {"step": step, "meta": meta, "dtypes": dtypes, "absent": absent, "tokenizer_name": encoding["name"]}
    record |= {"architecture": origin.name, "split_pattern": encoding["pat_str"]}
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return model, tokenizer


def _probed(origin: Origin, model: NanochatForCausalLM, tokenizer: PreTrainedTokenizerFast, decisions: Decisions):
    # the architecture with the lower loss among those that fit; the model gets its soft-cap
    if not origin.others:
        decisions.say("--probe has nothing to decide: the files tell")
        return origin
    caps = {ARCHITECTURES[name]["final_logit_softcapping"]: name for name in (origin.name, *origin.others)}
    losses = losses_by_cap(model, tokenizer, decisions.probe or "", list(caps))
    best = min(losses, key=losses.__getitem__)
    model.config.final_logit_softcapping, model.config.rope_in_bfloat16 = best, caps[best] == ROUNDED
    shown = ", ".join(f"{loss:.4f} with soft-cap {cap:g}" for cap, loss in losses.items())
    return Origin(caps[best], f"the loss of the probed text is {shown}")


def _say_whose_windows(folder: Path, meta: Mapping[str, Any], config: NanochatConfig, say: Callable[[str], None]):
    # fine-tuning writes its own sequence_len, from which nanochat computes other windows than it trained with
    user = meta.get("user_config") or {}
    if "depth" in user or not (any(name in user for name in FINE_TUNED) or meta.keys() == {"model_config"}):
        return
    own, keys = config.max_position_embeddings, config.sliding_window
    base = folder.resolve().parent.parent / "base_checkpoints" / folder.resolve().name
    try:
        theirs = read_json(base / f"meta_{newest(base):06d}.json")["model_config"]["sequence_len"]
    except (ValueError, KeyError, TypeError):
        say(
            f"a fine-tuned checkpoint: its sequence_len {own} is fine-tuning's own and makes windows of {keys} keys; "
            "if the base model was trained with another, give it as --sequence-len"
        )
        return
    if theirs != own:
        say(
            f"a fine-tuned checkpoint: its sequence_len {own} makes windows of {keys} keys, but the base model in "
            f"{base} was trained with {theirs}: --sequence-len {theirs} keeps the base's windows"
        )


def export_checkpoint(
    folder: str | Path,
    output: str | Path,
    step: int | None = None,
    tokenizer_output: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the model folder `folder` as a checkpoint of nanochat; returns the path of the weights.

    The files are `output/model_{step}.pt`, its meta file, and tokenizer.pkl with token_bytes.pt in `tokenizer_output`
    or `output`. A folder that came from nanochat goes back as it was. Any other gets bfloat16 tables, as nanochat keeps
    them on CUDA: its attention wants values of one dtype. `say` gets the line about which nanochat computes the same.

    Raises ValueError for a model that nanochat cannot describe, and where a file exists already.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != NanochatConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {config.model_type}; only {NanochatConfig.model_type} can go to nanochat"
        )
    record = read_json(Path(folder) / RECORD) if (Path(folder) / RECORD).is_file() else {}
    fields, architecture = config_to_nanochat(config, of_2025=bool(record))
    tokenizer = load_tokenizer(folder)
    step = record.get("step", 0) if step is None else step
    output = Path(output)
    path, meta_path = output / f"model_{step:06d}.pt", output / f"meta_{step:06d}.json"
    encoding_folder = Path(tokenizer_output or output)
    _refuse_existing(path, meta_path, encoding_folder / "tokenizer.pkl")
    weights = _weights_for_export(folder, record)
    encoding_folder.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_encoding(tokenizer, encoding_folder, record.get("tokenizer_name", "rustbpe"), record.get("split_pattern"))
    meta = record.get("meta") or {"step": step, "val_bpb": None, "model_config": fields, "user_config": {}}
    meta_path.write_text(json.dumps(meta | {"step": step}, indent=2) + "\n", encoding="utf-8")
    torch.save(weights, path)
    say(f"nanochat of the architecture {architecture} computes the same; no other version does")
    return path


def _weights_for_export(folder: str | Path, record: dict[str, Any]) -> Weights:
    # with the dtypes, the rows and the lambdas of the checkpoint that `record` tells of; {} where there was none
    state = NanochatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    rows = len(state["lm_head.weight"])
    if record:
        dtypes = {n: getattr(torch, d) for n, d in record["dtypes"].items()}
    else:
        tables = [n for n in map(name_to_nanochat, state) if is_table(n) and n != "lm_head.weight"]
        dtypes, rows = dict.fromkeys(tables, torch.bfloat16), -(-rows // 64) * 64
    weights = weights_to_nanochat(state, dtypes, rows)
    for name in record.get("absent", ()):
        del weights[name]
    return weights


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise ValueError(f"{path} exists already; name another folder")


def _write(model: NanochatForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    # generation ends where a turn or a document ends
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.generation_config.update(bos_token_id=ends[1], eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    export(model, tokenizer, output, keep_padding=True)
