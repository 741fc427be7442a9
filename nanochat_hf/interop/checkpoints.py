"""Checkpoints of the original nanochat ↔ model folders of ours.

The two architectures are the same. They differ in the names of the weights, the dtype of the tables, and the files.
Float32 holds every bfloat16 value, and `nanochat.json` in the model folder keeps what else the checkpoint had. So a
checkpoint that is imported and exported again is the same, bit for bit.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, PreTrainedTokenizerFast

from nanochat_hf.interop.folder import export

from ..model import NanochatConfig, NanochatForCausalLM
from ..tokenizer import load_tokenizer
from .encoding import read_encoding, tokenizer_from_encoding, write_encoding
from .from_transformers import model_from_transformers

FIELDS = {  # the reference's name → ours
    "sequence_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "n_embd": "hidden_size",
    "window_pattern": "window_pattern",
}
OLD_FIELDS = {"window_pattern": "L"}  # checkpoints older than the field were computed with this
OLD_LAMBDAS = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
FIXED = {  # no field of the reference sets these
    "rope_theta": 10000.0,
    "rope_in_bfloat16": True,
    "rms_norm_eps": None,
    "final_logit_softcapping": 15.0,
    "use_value_embeddings": True,
}
VALUE_EMBEDDINGS = re.compile(r"value_embeds\.\d+\.weight|transformer\.h\.\d+\.attn\.ve_gate\.weight")
MATRICES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.ve_gate": "self_attn.ve_gate",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
RECORD = "nanochat.json"
Weights = dict[str, torch.Tensor]


def config_from_nanochat(fields: object, weights: Weights | None = None) -> NanochatConfig:
    """nanochat's `model_config`, a dict → NanochatConfig.

    `weights`, the state dict, tells what no field does: checkpoints of 2025 have no value embeddings, and their tables
    have no padding.

    Raises ValueError where a field is missing or a size is impossible.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"model_config holds {type(fields).__name__}; it must be an object with {', '.join(FIELDS)}")
    given: dict[str, Any] = OLD_FIELDS | {"n_kv_head": fields.get("n_head")} | fields
    missing = [name for name in FIELDS if given.get(name) is None]
    if missing:
        raise ValueError(f"model_config lacks {', '.join(missing)}; is this a checkpoint of nanochat?")
    for name in FIELDS.keys() - {"window_pattern"}:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"model_config: {name}={given[name]!r} must be a positive whole number")
    if not isinstance(given["window_pattern"], str):
        raise ValueError(f"model_config: window_pattern={given['window_pattern']!r} must be text made of S and L")
    settings: dict[str, Any] = {ours: given[theirs] for theirs, ours in FIELDS.items()}
    if weights is not None:
        settings["use_value_embeddings"] = any(map(VALUE_EMBEDDINGS.fullmatch, weights))
        if len(weights.get("lm_head.weight", ())) == given["vocab_size"]:
            settings["pad_vocab_to_multiple_of"] = 1
    return NanochatConfig(**settings)


def config_to_nanochat(config: NanochatConfig, of_2025: bool = False) -> dict[str, Any]:
    """NanochatConfig → nanochat's `model_config`.

    `of_2025`: the model came from a nanochat without value embeddings, so it may lack them.

    Raises ValueError for a setting that nanochat has no field for.
    """
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    expected = config_from_nanochat(fields)
    for name in ("intermediate_size", "head_dim", "layer_types", "sliding_window", *FIXED):
        own, theirs = getattr(config, name), FIXED.get(name, getattr(expected, name))
        if name == "use_value_embeddings" and of_2025:
            continue
        if own != theirs:
            raise ValueError(
                f"{name}={own} cannot be told to nanochat, which would compute with {theirs}; "
                "export a model made with that"
            )
    return fields


def name_to_nanochat(name: str) -> str:
    """The name of any parameter of ours → nanochat's.

    >>> name_to_nanochat("model.layers.3.mlp.up_proj.weight")
    'transformer.h.3.mlp.c_fc.weight'
    """
    if name == "model.embed_tokens.weight":
        return "transformer.wte.weight"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if layer:
        theirs = {ours: theirs for theirs, ours in MATRICES.items()}[layer[2]]
        return f"transformer.h.{layer[1]}.{theirs}.weight"
    return name.removeprefix("model.")


def weights_from_nanochat(weights: Mapping[str, Any], config: NanochatConfig) -> Weights:
    """A state dict of nanochat, without `_orig_mod.` prefixes → ours, in float32.

    Where it has no lambdas they get the values that change nothing.

    Raises ValueError, with the name, for a tensor that is missing, unknown, of another shape, or not floating point.
    """
    weights = dict(weights)
    for name, value in OLD_LAMBDAS.items():
        weights.setdefault(name, torch.full((config.num_hidden_layers,), value))
    names = {name_to_nanochat(name): (name, value.shape) for name, value in _empty(config).state_dict().items()}
    missing, unknown = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
    if missing or unknown:
        kind, listed = ("lacks", missing) if missing else ("has the unknown", unknown)
        raise ValueError(
            f"the checkpoint {kind} {listed[0]} ({len(listed)} such tensors); its model_config does not describe it"
        )
    for theirs, (_, shape) in names.items():
        value = weights[theirs]
        if not torch.is_tensor(value) or not value.is_floating_point():
            held = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"{theirs} holds {held}; weights must be floating point numbers")
        if value.shape != shape:
            raise ValueError(f"{theirs} has shape {tuple(value.shape)}, model_config asks for {tuple(shape)}")
    return {ours: weights[theirs].float().contiguous() for theirs, (ours, _) in names.items()}


def weights_to_nanochat(weights: Weights, dtypes: Mapping[str, torch.dtype], rows: int) -> Weights:
    """Our state dict → nanochat's.

    `dtypes` maps names of nanochat's to a dtype; the other tensors become float32. Tables of the vocabulary get `rows`
    rows, of which the added ones are zero.
    """
    named = {name_to_nanochat(name): value.detach().cpu() for name, value in weights.items()}
    for name in filter(is_table, named):
        named[name] = F.pad(named[name], (0, 0, 0, rows - len(named[name])))
    return {name: value.to(dtypes.get(name, torch.float32)).contiguous() for name, value in named.items()}


def is_table(name: str) -> bool:
    """Whether a name of nanochat's is that of a table with a row for each token."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")


def import_checkpoint(
    checkpoint_dir: str | Path,
    output: str | Path,
    step: int | None = None,
    tokenizer_dir: str | Path | None = None,
) -> tuple[NanochatForCausalLM, PreTrainedTokenizerFast]:
    """Write the model folder `output` from a checkpoint; returns the model and the tokenizer.

    The checkpoint is `checkpoint_dir/model_{step}.pt`, its meta file, and a tokenizer.pkl. `step` defaults to the
    newest. The tokenizer is looked for beside the weights, then where nanochat keeps it: ../../tokenizer. A folder of
    transformers' own NanoChat (config.json, safetensors, tokenizer) can be imported too, and has no steps.

    Raises ValueError where a file is missing or damaged, where files do not fit each other, and where `output` already
    holds something.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} already holds something; name a new folder")
    folder = Path(checkpoint_dir)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"--step {step}: {folder} is a folder of transformers, which has no steps; leave it out")
        model, tokenizer = model_from_transformers(folder, tokenizer_dir)
        _set_ends(model, tokenizer)
        export(model, tokenizer, output, keep_padding=True)
        return model.eval(), tokenizer
    step = _newest(folder) if step is None else step
    meta = _read_json(folder / f"meta_{step:06d}.json")
    stored = _read_weights(folder / f"model_{step:06d}.pt")
    config = config_from_nanochat(meta.get("model_config"), stored)
    weights = weights_from_nanochat(stored, config)
    encoding = read_encoding(_find_tokenizer(folder, tokenizer_dir))
    tokenizer = tokenizer_from_encoding(encoding, config.max_position_embeddings)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "give the one it was trained with"
        )
    model = _empty(config)
    model.load_state_dict(weights, assign=True)
    _set_ends(model, tokenizer)
    export(model, tokenizer, output, keep_padding=True)
    dtypes = {n: str(v.dtype).removeprefix("torch.") for n, v in stored.items() if v.dtype != torch.float32}
    absent = [n for n in OLD_LAMBDAS if n not in stored]
    record = {"step": step, "meta": meta, "dtypes": dtypes, "absent": absent, "tokenizer_name": encoding["name"]}
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return model.eval(), tokenizer


def export_checkpoint(
    folder: str | Path,
    output: str | Path,
    step: int | None = None,
    tokenizer_output: str | Path | None = None,
) -> Path:
    """Write the model folder `folder` as a checkpoint of nanochat; returns the path of the weights.

    The files are `output/model_{step}.pt`, its meta file, and tokenizer.pkl with token_bytes.pt in `tokenizer_output`
    or `output`. A folder that came from nanochat goes back as it was. Any other gets bfloat16 tables, as nanochat keeps
    them on CUDA: its attention wants values of one dtype.

    Raises ValueError for a model that nanochat cannot describe, and where a file exists already.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != NanochatConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {config.model_type}; only {NanochatConfig.model_type} can go to nanochat"
        )
    record = _read_json(Path(folder) / RECORD) if (Path(folder) / RECORD).is_file() else {}
    fields = config_to_nanochat(config, of_2025=bool(record))
    tokenizer = load_tokenizer(folder)
    step = record.get("step", 0) if step is None else step
    output = Path(output)
    path, meta_path = output / f"model_{step:06d}.pt", output / f"meta_{step:06d}.json"
    encoding_folder = Path(tokenizer_output or output)
    _refuse_existing(path, meta_path, encoding_folder / "tokenizer.pkl")
    weights = _weights_for_export(folder, record)
    encoding_folder.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_encoding(tokenizer, encoding_folder, record.get("tokenizer_name", "rustbpe"))
    meta = record.get("meta") or {"step": step, "val_bpb": None, "model_config": fields, "user_config": {}}
    meta_path.write_text(json.dumps(meta | {"step": step}, indent=2) + "\n", encoding="utf-8")
    torch.save(weights, path)
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


def _set_ends(model: NanochatForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    # generation ends where a turn or a document ends
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.generation_config.update(bos_token_id=ends[1], eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def _empty(config: NanochatConfig) -> NanochatForCausalLM:
    with torch.device("meta"):  # no memory, and no time spent on random numbers
        return NanochatForCausalLM(config)


def _newest(folder: Path) -> int:
    if not folder.is_dir():
        raise ValueError(f"--checkpoint-dir {folder}: no such folder")
    steps = [int(found[1]) for p in folder.iterdir() if (found := re.fullmatch(r"model_(\d+)\.pt", p.name))]
    if not steps:
        raise ValueError(
            f"--checkpoint-dir {folder}: holds no model_NNNNNN.pt; give a folder such as base_checkpoints/d12"
        )
    return max(steps)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is --step right?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}; it must be an object")
    return found


def _read_weights(path: Path) -> Weights:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is --step right?") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:100]}); copy it again") from None
    if not isinstance(found, dict) or not all(isinstance(n, str) and torch.is_tensor(v) for n, v in found.items()):
        raise ValueError(f"{path}: not a state dict; give the model file, not the optimizer's")
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def _find_tokenizer(folder: Path, given: str | Path | None) -> Path:
    places = [Path(given)] if given else [folder, folder.resolve().parent.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return place / "tokenizer.pkl"
    raise ValueError(f"no tokenizer.pkl in {' or '.join(map(str, places))}; give its folder with --tokenizer")
