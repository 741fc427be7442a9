"""Saving and loading: alone without the package, on the meta device, in bfloat16, with missing weights."""

import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import nanochat_hf  # noqa: F401  (registers the classes)
from nanochat_hf.model import NanochatConfig, NanochatForCausalLM, NanochatModel
from nanochat_hf.model.modeling_nanochat_hf import NanochatAttention
from tests.support.models import build, tokens

PARTS = ("configuration", "modeling", "layers", "ops", "loss", "masks", "resizing", "smear")
CODE = {f"{part}_nanochat_hf.py" for part in PARTS}
CLASSIFIERS = {"AutoModelForSequenceClassification", "AutoModelForTokenClassification"}
AUTO = {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} | CLASSIFIERS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    build().save_pretrained(folder)
    return folder


def test_saving_writes_code_and_auto_map(saved):
    assert {p.name for p in saved.iterdir()} >= CODE | {"config.json", "model.safetensors"}
    config = json.loads((saved / "config.json").read_text())
    assert set(config["auto_map"]) == AUTO and config["model_type"] == "nanochat_hf"


def test_nothing_of_the_kernels_ships(saved):
    words = re.compile(r"cudnn|triton|fused|main_grad|joint_|nanochat_hf\.kernels", re.IGNORECASE)
    for name in CODE:
        assert not words.findall((saved / name).read_text()), name


def test_attention_is_called_in_the_forward_of_its_class_once_by_the_interface():
    """vLLM's backend reads that source: one name from ALL_ATTENTION_FUNCTIONS, one call of it, scaling from self."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(NanochatAttention.forward)))
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS.get_interface(" in ast.unparse(node.value)
        for target in node.targets
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names]
    assert len(names) == len(calls) == 1
    assert {keyword.arg: ast.unparse(keyword.value) for keyword in calls[0].keywords}["scaling"] == "self.scaling"


def test_the_base_model_alone_is_saved_with_the_same_border(tmp_path):
    build().model.save_pretrained(tmp_path / "base")
    assert {p.name for p in (tmp_path / "base").iterdir()} >= CODE
    assert set(json.loads((tmp_path / "base" / "config.json").read_text())["auto_map"]) == AUTO


def test_settings_survive_saving(tmp_path):
    settings = dict(
        window_pattern="SL",
        sliding_window=5,
        rope_theta=500.0,
        final_logit_softcapping=30.0,
        head_dim=32,
        intermediate_size=96,
    )
    before = build(**settings)
    before.save_pretrained(tmp_path)
    after = NanochatForCausalLM.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert getattr(after.config, name) == value
    assert after.config.layer_types == before.config.layer_types and after.config.num_key_value_heads == 2
    assert torch.equal(after(tokens(1, 12)).logits, before(tokens(1, 12)).logits)


def test_auto_classes_load_the_same_logits(saved):
    ids = tokens(2, 20)
    expected = build()(ids)
    model = AutoModelForCausalLM.from_pretrained(saved)  # built on the meta device, weights filled in after
    assert type(model) is NanochatForCausalLM and torch.equal(model(ids).logits, expected.logits)
    base = AutoModel.from_pretrained(saved)
    assert type(base) is NanochatModel
    assert torch.equal(base(ids).last_hidden_state, build().model(ids).last_hidden_state)
    assert type(AutoConfig.from_pretrained(saved)) is NanochatConfig


def test_remote_code_loads_generates_and_saves_again_where_the_package_is_blocked(saved, tmp_path):
    ids = tokens(1, 20)
    code = f"""
import sys; sys.modules["nanochat_hf"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
load = lambda auto, folder: auto.from_pretrained(folder, trust_remote_code=True)
model = load(AutoModelForCausalLM, {str(saved)!r})
assert load(AutoConfig, {str(saved)!r}).model_type == "nanochat_hf"
ids = torch.tensor({ids.tolist()})
assert torch.equal(load(AutoModel, {str(saved)!r})(ids).last_hidden_state, model.model(ids).last_hidden_state)
assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 23)
model.save_pretrained("again")
again = load(AutoModelForCausalLM, "again")
assert torch.equal(again(ids).logits, model(ids).logits)
import transformers
assert not hasattr(transformers, "NanochatForCausalLM")  # vLLM takes a class of that name for the model's own
torch.save(model(ids).logits, "logits.pt")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), build()(ids).logits)


def test_a_model_built_on_meta_is_whole_once_filled():
    with torch.device("meta"):
        model = NanochatForCausalLM(build().config)
    assert {p.device.type for p in model.parameters()} == {"meta"} and not list(model.buffers())
    model.load_state_dict(build().state_dict(), assign=True)
    assert torch.equal(model.eval()(tokens(1, 20)).logits, build()(tokens(1, 20)).logits)


def test_missing_weights_get_their_own_initialisation(saved, tmp_path):
    NanochatForCausalLM.from_pretrained(saved).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = [
        n
        for n in weights
        if any(part in n for part in ("x0_lambdas", "layers.1.self_attn.o_proj", "embed_tokens", "lm_head"))
    ]
    save_file({n: w for n, w in weights.items() if n not in lost}, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = NanochatForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(lost) and len(lost) == 4
    assert (
        torch.equal(model.model.x0_lambdas, torch.full((4,), 0.1))
        and not model.model.layers[1].self_attn.o_proj.weight.any()
    )
    assert abs(model.model.embed_tokens.weight.std() - 1) < 0.05 and abs(model.lm_head.weight.std() / 0.001 - 1) < 0.05
    assert torch.equal(model.model.resid_lambdas, weights["model.resid_lambdas"])


def test_bfloat16_keeps_lambdas_exact_and_stays_near_float32(saved):
    ids = tokens(2, 20)
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    exact = build()
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if "lambdas" in name else torch.bfloat16), name
    assert torch.equal(model.model.x0_lambdas, exact.model.x0_lambdas)
    out = model(ids, output_hidden_states=True)
    assert {h.dtype for h in out.hidden_states} == {torch.bfloat16} and out.logits.dtype == torch.float32
    error = (out.logits - exact(ids).logits).square().mean().sqrt() / exact(ids).logits.square().mean().sqrt()
    assert error < 0.05
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = exact.train()(ids, labels=ids).loss
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in exact.parameters())
