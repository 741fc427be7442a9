"""Checkpoints of the original nanochat ↔ ours: the weights, and the way from a checkpoint folder to a model folder and back.

The two architectures are one; names, the dtype of the tables and the files differ. Float32 holds every bfloat16 value, so a
checkpoint imported and exported again is the same, bit for bit: `nanochat.json` in the model folder remembers the rest.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig

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
OLD_FIELDS = {"window_pattern": "L"}  # what a checkpoint from before the field was computed with
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


def config_from_nanochat(fields, weights=None):
    """The reference's `model_config` (dict) → NanochatConfig. ValueError where a field is missing or no size can be so.

    `weights`, the state dict, says what no field does: checkpoints of 2025 have no value embeddings, and no rows of padding.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"model_config holds {type(fields).__name__}; it must be an object with {', '.join(FIELDS)}")
    fields = OLD_FIELDS | {"n_kv_head": fields.get("n_head")} | fields
    missing = [name for name in FIELDS if fields.get(name) is None]
    if missing:
        raise ValueError(f"model_config lacks {', '.join(missing)}; is this a checkpoint of nanochat?")
    for name in FIELDS.keys() - {"window_pattern"}:
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"model_config: {name}={fields[name]!r} must be a positive whole number")
    if not isinstance(fields["window_pattern"], str):
        raise ValueError(f"model_config: window_pattern={fields['window_pattern']!r} must be text made of S and L")
    settings = {ours: fields[theirs] for theirs, ours in FIELDS.items()}
    if weights is not None:
        settings["use_value_embeddings"] = any(map(VALUE_EMBEDDINGS.fullmatch, weights))
        if len(weights.get("lm_head.weight", ())) == fields["vocab_size"]:
            settings["pad_vocab_to_multiple_of"] = 1
    return NanochatConfig(**settings)


def config_to_nanochat(config, of_2025=False):
    """NanochatConfig → the reference's `model_config`. ValueError for settings that it has no field for."""
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    expected = config_from_nanochat(fields)
    for name in ("intermediate_size", "head_dim", "layer_types", "sliding_window", *FIXED):
        own, theirs = getattr(config, name), FIXED.get(name, getattr(expected, name))
        if name == "use_value_embeddings" and of_2025:
            continue  # it came from a nanochat that had none
        if own != theirs:
            raise ValueError(
                f"{name}={own} cannot be told to nanochat, which would compute with {theirs}; export a model made with that"
            )
    return fields


def name_to_nanochat(name):
    """'model.layers.3.mlp.up_proj.weight' → 'transformer.h.3.mlp.c_fc.weight', and so on for every parameter of ours."""
    if name == "model.embed_tokens.weight":
        return "transformer.wte.weight"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if layer:
        theirs = {ours: theirs for theirs, ours in MATRICES.items()}[layer[2]]
        return f"transformer.h.{layer[1]}.{theirs}.weight"
    return name.removeprefix("model.")


def weights_from_nanochat(weights, config):
    """A state dict of the reference (no `_orig_mod.` prefixes) → ours, in float32. Absent lambdas get the value that leaves the stream as it was.

    ValueError names a tensor that is missing, unknown, of another shape or no floating point numbers.
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
            raise ValueError(
                f"{theirs} holds {getattr(value, 'dtype', type(value).__name__)}; weights must be floating point numbers"
            )
        if value.shape != shape:
            raise ValueError(f"{theirs} has shape {tuple(value.shape)}, model_config asks for {tuple(shape)}")
    return {ours: weights[theirs].float().contiguous() for theirs, (ours, _) in names.items()}


def weights_to_nanochat(weights, dtypes, rows):
    """Our state dict → the reference's; `dtypes` maps the reference's names to a torch dtype, float32 for the others.

    Tables of the vocabulary get `rows` rows, those that they lack zeros.
    """
    named = {name_to_nanochat(name): value.detach().cpu() for name, value in weights.items()}
    for name in filter(is_table, named):
        named[name] = F.pad(named[name], (0, 0, 0, rows - len(named[name])))
    return {name: value.to(dtypes.get(name, torch.float32)).contiguous() for name, value in named.items()}


def is_table(name):
    """Whether the reference's name is that of a table with a row per token."""
    return name in ("transformer.wte.weight", "lm_head.weight") or name.startswith("value_embeds.")


def import_checkpoint(checkpoint_dir, output, step=None, tokenizer_dir=None):
    """`checkpoint_dir/model_{step}.pt` with its meta file and tokenizer.pkl → the model folder `output`; returns (model, tokenizer).

    A folder of transformers' own NanoChat (config.json, safetensors, tokenizer) is taken too, and has no steps. `step` defaults to the newest. The tokenizer is looked for beside the weights, then where nanochat keeps it: ../../tokenizer.
    ValueError where a file is missing or damaged, where they do not fit each other, or where `output` already holds something.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} already holds something; name a new folder")
    folder = Path(checkpoint_dir)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"--step {step}: {folder} is a folder of transformers, which has no steps; leave it out")
        model, tokenizer = model_from_transformers(folder, tokenizer_dir)
        export(_told_its_ends(model, tokenizer), tokenizer, output, keep_padding=True)
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
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}; give the one it was trained with"
        )
    model = _empty(config)
    model.load_state_dict(weights, assign=True)
    export(_told_its_ends(model, tokenizer), tokenizer, output, keep_padding=True)
    dtypes = {n: str(v.dtype).removeprefix("torch.") for n, v in stored.items() if v.dtype != torch.float32}
    absent = [n for n in OLD_LAMBDAS if n not in stored]
    record = {"step": step, "meta": meta, "dtypes": dtypes, "absent": absent, "tokenizer_name": encoding["name"]}
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return model.eval(), tokenizer


def export_checkpoint(folder, output, step=None, tokenizer_output=None):
    """The model folder `folder` → `output/model_{step}.pt`, its meta file, tokenizer.pkl and token_bytes.pt; returns the weights' path.

    A folder that came from nanochat goes back as it was. Any other gets bfloat16 tables, as the reference keeps them on CUDA: its
    attention wants values of one dtype. ValueError for a model the reference cannot describe, or where the files exist already.
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
    for existing in (path, meta_path, encoding_folder / "tokenizer.pkl"):
        if existing.exists():
            raise ValueError(f"{existing} exists already; name another folder")
    state = NanochatForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    tables = [n for n in map(name_to_nanochat, state) if is_table(n) and n != "lm_head.weight"]
    stored_rows = len(state["lm_head.weight"])
    dtypes = (
        {n: getattr(torch, d) for n, d in record["dtypes"].items()} if record else dict.fromkeys(tables, torch.bfloat16)
    )
    weights = weights_to_nanochat(state, dtypes, stored_rows if record else -(-stored_rows // 64) * 64)
    for name in record.get("absent", ()):
        del weights[name]
    encoding_folder.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    write_encoding(tokenizer, encoding_folder, record.get("tokenizer_name", "rustbpe"))
    meta = record.get("meta") or {"step": step, "val_bpb": None, "model_config": fields, "user_config": {}}
    meta_path.write_text(json.dumps(meta | {"step": step}, indent=2) + "\n", encoding="utf-8")
    torch.save(weights, path)
    return path


def _told_its_ends(model, tokenizer):
    """The model, whose generation now ends where a turn or a document does."""
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.generation_config.update(bos_token_id=ends[1], eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    return model


def _empty(config):
    with torch.device("meta"):  # no memory, and no time spent on random numbers
        return NanochatForCausalLM(config)


def _newest(folder):
    if not folder.is_dir():
        raise ValueError(f"--checkpoint-dir {folder}: no such folder")
    steps = [int(found[1]) for p in folder.iterdir() if (found := re.fullmatch(r"model_(\d+)\.pt", p.name))]
    if not steps:
        raise ValueError(
            f"--checkpoint-dir {folder}: holds no model_NNNNNN.pt; give a folder such as base_checkpoints/d12"
        )
    return max(steps)


def _read_json(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is --step right?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}; it must be an object")
    return found


def _read_weights(path):
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is --step right?") from None
    except Exception as error:  # a damaged or hostile file can fail in any way
        raise ValueError(f"{path}: not a file of tensors ({str(error).splitlines()[0][:100]}); copy it again") from None
    if not isinstance(found, dict) or not all(isinstance(n, str) and torch.is_tensor(v) for n, v in found.items()):
        raise ValueError(f"{path}: not a state dict; give the model file, not the optimizer's")
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def _find_tokenizer(folder, given):
    places = [Path(given)] if given else [folder, folder.resolve().parent.parent / "tokenizer"]
    for place in places:
        if (place / "tokenizer.pkl").is_file():
            return place / "tokenizer.pkl"
    raise ValueError(f"no tokenizer.pkl in {' or '.join(map(str, places))}; give its folder with --tokenizer")
