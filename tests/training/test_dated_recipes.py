"""--recipe: each date's numbers, recomputed from nanochat's formulas; flags and files that win; what the plan says."""

import json
import math

import pytest

from nanochat_hf import scaling
from nanochat_hf.config import parse
from nanochat_hf.model import NanochatConfig
from nanochat_hf.optim import build_param_groups
from nanochat_hf.recipes import ARCHITECTURES, RECIPES
from nanochat_hf.training.architecture import ArchitectureConfig, recipe_line
from nanochat_hf.training.config import TrainConfig
from nanochat_hf.training.pretraining import BASE_PARTS, BaseConfig, model_config, resolved, with_decay
from nanochat_hf.training.schedules import Schedule

NAMES = list(RECIPES)


class Vocabulary:
    """A tokenizer as sizes see it: so many tokens."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __len__(self):
        return 32768


def flags(*argv):
    """(BaseConfig, TrainConfig) of a command line."""
    base, *parts, _ = parse(
        [BaseConfig, *BASE_PARTS], ["--tokenizer", "t", "--output-dir", "o", *argv], presets=RECIPES
    )
    return base, TrainConfig(*parts)


def skeleton(name, depth=12):
    base, _ = flags("--recipe", name, "--depth", str(depth))
    return scaling.skeleton(model_config(base, Vocabulary(), 2048))


@pytest.mark.parametrize(("name", "parameters"), [("feb2026", 286_262_424), ("mar2026", 286_261_730)])
def test_depth_12_has_nanochats_parameters(name, parameters):
    model = skeleton(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.sliding_window == {"feb2026": 1025, "mar2026": 513}[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1000, 2521])
def test_schedules_are_nanochats(name, steps):
    _, config = flags("--recipe", name)
    schedule, february = Schedule(steps, config.schedule), name == "feb2026"
    warmdown, final, rise = (0.5, 0.0, 0) if february else (0.65, 0.05, 40)
    fall = round(warmdown * steps)
    for step in range(steps):
        rate = (step + 1) / rise if step < rise else 1.0
        if step > steps - fall:
            q = (steps - step) / fall
            rate = q + (1 - q) * final
        share = min(step / (300 if february else 400), 1)
        momentum = 0.85 + share * ((0.95 if february else 0.97) - 0.85)
        if not february and step >= 400 and step >= steps - fall:
            momentum = 0.97 - 0.07 * (step - (steps - fall)) / fall
        decay = 1 - step / steps if february else 0.5 * (1 + math.cos(math.pi * step / steps))
        found = schedule.lr(step), schedule.momentum(step), schedule.weight_decay(step), schedule.scalars(step)
        assert found == pytest.approx((rate, momentum, decay, 1.0), abs=1e-12), step


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_nanochats_rates_betas_and_decays(name):
    batch, february = 2**20, name == "feb2026"
    _, config = flags("--recipe", name)
    groups = build_param_groups(skeleton(name, 20), config.optim.optimizer(scaling.batch_lr_scale(batch)))
    b, narrow = math.sqrt(batch / 2**19), math.sqrt(768 / 1280)
    expected = {  # lr, betas, decay
        "unembedding": (0.004 * narrow * b, (0.8, 0.95), 0) if february else (0.008 * narrow * b, (0.8, 0.96), 0.01),
        "embedding": (0.3 * narrow * b, (0.8, 0.95), 0) if february else (0.3 * narrow * b, (0.8, 0.995), 0.001),
        "value_embeds": (0.3 * narrow * b, (0.8, 0.95), 0) if february else (0.15 * narrow * b, (0.8, 0.995), 0.01),
        "resid_lambdas": (0.005 * b, (0.8, 0.95), 0 if february else 0.05),
        "x0_lambdas": (0.5 * b, (0.96, 0.95), 0),
    }
    if not february:
        expected["smear_and_backout"] = (0.2, (0.8, 0.95), 0)
    found = {g["name"]: (g["lr"], g["betas"], g["weight_decay"]) for g in groups if g["kind"] == "adamw"}
    assert found.keys() == expected.keys()
    for group, (lr, betas, decay) in expected.items():
        assert found[group][0] == pytest.approx(lr) and found[group][1:] == (betas, decay), group
    for group in (g for g in groups if g["kind"] == "muon"):
        assert group["lr"] == pytest.approx(0.02 * b) and group["eps"] == 1e-10
        assert group["betas"][1] == (0.95 if february else 0.9)
        assert group["muon_margin"] == (0.02 if february else 0.01)
        assert (group["muon_eq"], group["muon_plus"]) == ((name == "head"), (name == "head"))


def counted(depth, gate):
    """Matrices and padded head of a depth, from sizes: P of nanochat's rules."""
    width, heads = 64 * depth + 64 * (depth % 2), (depth + 1) // 2
    gated = -(-depth // 2)  # every second layer, the last one always
    return depth * 12 * width**2 + gated * gate * heads + 32768 * width


@pytest.mark.parametrize(
    ("depth", "power"), [(8, 18), (10, 19), (12, 19), (16, 19), (18, 20), (20, 20), (26, 20), (32, 21)]
)
def test_the_batch_and_its_decay_follow_the_length(depth, power):
    base, config = flags("--recipe", "head", "--depth", str(depth))
    base, config = resolved(base, config, Vocabulary())
    assert config.run.total_batch_size == 2**power
    own, at_12 = 12 * counted(depth, 12), 12 * counted(12, 12)
    decay = with_decay(base, config, Vocabulary(), 2**power).optim.weight_decay
    assert decay == pytest.approx(0.28 * math.sqrt(2**power / 2**19) * at_12 / own)
    assert (
        resolved(*flags("--recipe", "head", "--total-batch-size", "65536"), Vocabulary())[1].run.total_batch_size
        == 65536
    )


def test_february_has_the_rule_by_depth_and_a_fixed_batch():
    base, config = flags("--recipe", "feb2026", "--depth", "20")
    base, config = resolved(base, config, Vocabulary())
    assert config.run.total_batch_size == 2**19 and base.data == "karpathy/fineweb-edu-100b-shuffle"
    assert with_decay(base, config, Vocabulary(), 2**19).optim.weight_decay == pytest.approx(0.2 * (12 / 20) ** 2)
    given, config = flags("--decay-rule", "given", "--weight-decay", "0.3", "--depth", "20")
    assert with_decay(given, config, Vocabulary(), 2**19).optim.weight_decay == 0.3


def test_every_value_of_a_recipe_is_a_flag_and_a_field_that_means_the_same():
    names = {name for name in RECIPES["head"]}
    base, config = flags()
    known = {*vars(base), *config.settings()}
    assert names <= known
    assert (
        set(ARCHITECTURES["feb2026"]) <= set(vars(NanochatConfig())) and len({*map(frozenset, RECIPES.values())}) == 1
    )
    # without a recipe the architecture is February's
    assert {name: getattr(base, name) for name in ARCHITECTURES["feb2026"]} == ARCHITECTURES["feb2026"]


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: mar2026\nwarmup_steps: 7\nqk_scale: 1.4\n")
    base, config = flags("--config", str(path), "--qk-scale", "1.5", "--smear", "false")
    assert (base.recipe, config.schedule.warmup_steps, base.qk_scale) == ("mar2026", 7, 1.5)
    assert base.smear is False and base.backout is True and config.optim.embedding_beta2 == 0.995
    line = recipe_line("mar2026", base, *config.parts())["recipe"]
    assert line == "mar2026, but qk_scale 1.5, smear False, warmup_steps 7"
    assert recipe_line("head", *flags("--recipe", "head")[:1]) == {"recipe": "head"} and recipe_line(None) == {}


def test_an_unknown_recipe_is_named(capsys):
    with pytest.raises(SystemExit):
        flags("--recipe", "april")
    assert "--recipe april is unknown; choose from feb2026, mar2026, head" in capsys.readouterr().err


def test_architecture_flags_reach_the_model():
    changed = ArchitectureConfig(smear=True, window_rule="third", resid_lambda_last=0.5)
    config = scaling.model_config(4, 300, 512, **changed.architecture)
    assert config.smear and config.sliding_window == 257 and config.resid_lambda_last == 0.5
    assert json.loads(config.to_json_string())["window_rule"] == "third"
