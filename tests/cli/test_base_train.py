"""Base training: its start, what it refuses before, the text that it holds out, and AdamW as Muon's baseline."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_hf import NanochatForCausalLM, scaling
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.data.streamed import TextBatches
from nanochat_hf.optim import MuonAdamW, OptimizerConfig, build_param_groups
from nanochat_hf.tokenizer import train_tokenizer
from nanochat_hf.training.tracking import read_metrics
from tests.support.hub import ROOT, TOKEN, environment
from tests.support.hub_endpoints import Repo
from tests.support.hub_server import HubServer
from tests.support.processes import Run

# o_proj and down_proj start at 0, so nothing reaches what feeds them in the first backward pass
BEHIND_ZEROS = ("q_proj", "k_proj", "v_proj", "ve_gate", "value_embeds", "up_proj")
# with every block at 0 the stream is a multiple of the embedding, and the last norm does not see its length
UNSEEN = ("resid_lambdas", "x0_lambdas")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"The cat number {i} counted letters, then some more." for i in range(9)], 280)


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """A folder with a tokenizer and a data set laid out as the Hub lays out shards."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "hub").mkdir()
    for shard in range(4):
        texts = [f"Cat {shard}-{i} counted " + f"{i} letters, then some more. " * (i % 5 + 1) for i in range(60)]
        pq.write_table(pa.table({"text": texts}), folder / "hub" / f"shard_{shard:05d}.parquet", row_group_size=20)
    return folder


def base(start, output, log, world=1, **changed):
    settings = {
        "tokenizer": start / "tokenizer",
        "data": start / "hub",
        "output_dir": output,
        "depth": 2,
        "aspect_ratio": 32,
        "head_dim": 32,
        "num_steps": 3,
        "max_seq_len": 32,
        "device_batch_size": 4,
        "eval_every": 0,
        "eval_batches": 1,
        "sample_every": 0,
        "log_every": 1,
        "dtype": "float32",
    } | changed
    return Run(
        "scripts.base_train",
        [p for k, v in settings.items() if v is not None for p in (f"--{k.replace('_', '-')}", v)],
        log,
        world,
    )


def test_the_first_loss_is_ln_v_and_one_step_wakes_every_gradient():
    torch.manual_seed(0)
    model = NanochatForCausalLM(scaling.model_config(4, 512, 64, aspect_ratio=32, head_dim=64)).train()
    ids = torch.randint(512, (8, 65))
    optimizer = MuonAdamW(build_param_groups(model))

    def gradients():
        optimizer.zero_grad()
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        loss.backward()
        return loss.item(), {name: p.grad.norm().item() for name, p in model.named_parameters()}

    loss, first = gradients()
    assert loss == pytest.approx(math.log(512), rel=0.01)
    for name, norm in first.items():
        if any(part in name for part in BEHIND_ZEROS):
            assert norm == 0, name
        elif any(part in name for part in UNSEEN):
            assert norm < 1e-6, name
        else:
            assert norm > 1e-4, name
    optimizer.step()
    _, second = gradients()
    assert min(second.values()) > 1e-7, second


def test_a_recipe_by_date_trains_its_own_architecture_and_flags_win(start, tmp_path):
    run = base(
        start,
        tmp_path / "run",
        tmp_path / "log",
        recipe="head",
        total_batch_size=256,
        warmup_steps=1,
        validation="last",
    )
    assert run.wait() == [0], run.text()
    assert "recipe      head, but " in run.text() and "warmup_steps 1" in run.text()
    assert "the fused kernels do not know muon_eq and muon_plus" in run.text()
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["recipe"] == "head" and settings["muon_plus"] and settings["decay_shape"] == "cosine"
    model = NanochatForCausalLM.from_pretrained(tmp_path / "run" / "final")
    config = model.config
    assert (config.smear, config.backout, config.qk_scale, config.value_gate_channels) == (True, True, 1.2, 12)
    assert model.model.smear.strength.item() != 0 and model.model.backout_lambda.item() != pytest.approx(0.2, abs=1e-6)


def test_adamw_in_muons_place_is_torchs_and_changes_nothing_else():
    torch.manual_seed(0)
    config = scaling.model_config(2, 280, 32, aspect_ratio=32, head_dim=32)
    ours = NanochatForCausalLM(config)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs = NanochatForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    settings = OptimizerConfig(matrix_lr=0.003, weight_decay=0.1, matrix_optimizer="adamw")
    groups, muon = (
        build_param_groups(ours, settings),
        build_param_groups(ours, OptimizerConfig(matrix_lr=0.003, weight_decay=0.1)),
    )
    assert {g["name"]: g["kind"] for g in groups if g["name"].startswith("matrix")} == {
        g["name"]: "adamw" for g in muon if g["kind"] == "muon"
    }
    for group, other in zip(groups, muon, strict=True):
        if other["kind"] == "adamw":
            assert group == other
    matrices = [p for n, p in theirs.named_parameters() if ".layers." in n]
    ours_optimizer = MuonAdamW(groups)
    reference = torch.optim.AdamW(matrices, lr=0.003, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(4):
        torch.manual_seed(step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours_optimizer.step()
        reference.step()
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if ".layers." in name:
            torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-6)


def test_rates_follow_the_batch_and_decay_the_depth(start, tmp_path):
    run = base(start, tmp_path / "run", tmp_path / "log", total_batch_size=256)
    assert run.wait() == [0], run.text()
    assert "(2 micro-batches of 4 rows × 32 positions on 1 processes)" in run.text() and "cropped away" in run.text()
    entries = [e for e in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in e]
    scale = math.sqrt(256 / 2**19)
    # flat to the half of the run, then to 0; taken at the middle of a step
    assert [e["train/lr_multiplier"] for e in entries] == pytest.approx([1, 1, 1 / 3])
    assert entries[0]["lr/matrix"] == pytest.approx(0.02 * scale)
    assert entries[0]["lr/unembedding"] == pytest.approx(0.004 * scale * (64 / 768) ** -0.5)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weight_decay"] == pytest.approx(0.2 * 36)
    assert entries[0]["train/loss"] == pytest.approx(math.log(280), rel=0.01)


@pytest.mark.parametrize("packing", ["crop", "keep"])
def test_a_folder_laid_out_as_on_the_hub_streams_and_resumes(start, tmp_path, packing):
    flags = dict(
        streaming=True, packing=packing, save_every=1, keep=0, eval_batches=1, total_batch_size=128, num_steps=4
    )
    whole = base(start, tmp_path / "whole", tmp_path / "log", **flags)
    assert whole.wait() == [0], whole.text()
    again = base(start, tmp_path / "again", tmp_path / "log2", **flags, resume=tmp_path / "whole" / "checkpoint-000002")
    assert again.wait() == [0] and "at step 2 of 4" in again.text(), again.text()
    losses = [
        {e["step"]: e["train/loss"] for e in read_metrics(tmp_path / n / "metrics.jsonl") if "train/loss" in e}
        for n in ("whole", "again")
    ]
    assert set(losses[1]) == {3, 4}
    files = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]


def test_the_default_recipe_streams_from_its_hub_name(start, tmp_path):
    """From a Hub on loopback that holds shards at its root, as the real data set has them."""
    files = {path.name: path.read_bytes() for path in (start / "hub").iterdir()}
    shape = [
        "--depth",
        "2",
        "--aspect-ratio",
        "32",
        "--head-dim",
        "32",
        "--max-seq-len",
        "32",
        "--device-batch-size",
        "4",
        "--num-steps",
        "2",
    ]
    flags = [
        *shape,
        "--total-batch-size",
        "128",
        "--eval-batches",
        "1",
        "--tokenizer",
        str(start / "tokenizer"),
        "--num-workers",
        "2",
    ]
    with HubServer({TOKEN: "user"}) as server:
        server.repos["datasets", "karpathy/climbmix-400b-shuffle"] = Repo()
        server.repos["datasets", "karpathy/climbmix-400b-shuffle"].commit("main", "shards", files)
        given = ["--config", ROOT / "scripts/recipes/base.yaml", *flags, "--output-dir", "run"]
        known = environment(server, tmp_path)
        run = Run("scripts.base_train", given, tmp_path / "log", environment=known, folder=tmp_path)
        codes = run.wait()
        asked = [path for _, path, _ in server.requests if "/resolve/" in path]
    assert codes == [0], run.text()[-3000:]
    assert any("shard_00003.parquet" in path for path in asked), "the last shard, for validation"
    assert "karpathy/climbmix-400b-shuffle, packing crop" in run.text() and "base d2 step 2/2" in run.text()
    assert "The capital of France is" in run.text()  # the seven prompts, at the end
    assert (
        any("shard_00000.parquet" in path for path in asked)
        and (tmp_path / "run" / "final" / "model.safetensors").is_file()
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"text_column": "body"}, "no column 'body'; it has text"),
        (
            {"num_steps": None, "target_param_data_ratio": 1e-9},
            "the horizon is 0 steps of 128 tokens; raise --num-steps",
        ),
        ({"num_steps": None, "target_flops": 1.0}, "the horizon is 0 steps"),
        ({"num_steps": 0}, "--num-steps 0 must be at least 1"),
        (
            {"total_batch_size": 128 * 4096},
            "tokens are fewer than the 524,288 of one step; give more text or lower --total-batch-size",
        ),
        ({"data": "nobody/nothing"}, "nobody/nothing: cannot be loaded"),
        ({"matrix_optimizer": "sgd"}, "--matrix-optimizer sgd is unknown; choose from muon, adamw"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_heavy(start, tmp_path, changed, reason):
    run = base(start, tmp_path / "run", tmp_path / "log", **changed)
    assert run.wait() == [2], run.text()
    assert (
        reason in run.text()
        and "Traceback" not in run.text()
        and "step " not in run.text().replace("steps", "").replace("one step", "")
    )
    assert not (tmp_path / "run" / "final").exists()


def test_a_checkpoint_of_another_vocabulary_is_named(start, tmp_path):
    assert base(start, tmp_path / "run", tmp_path / "log", num_steps=1).wait() == [0]
    train_tokenizer([f"Other text {i} for other tokens." for i in range(9)], 283).save_pretrained(tmp_path / "other")
    run = base(start, tmp_path / "run", tmp_path / "log2", tokenizer=tmp_path / "other", num_steps=2, resume="auto")
    assert run.wait() == [2] and "vocab" in run.text() and "Traceback" not in run.text(), run.text()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_held_out_documents_are_never_trained_on(start, tokenizer, world, workers):
    """As base_train splits a stream without --validation: the first 20 of 240 documents, the same on both sides."""

    def marks(source, count):
        seen = set()
        for rank in range(world):
            batches = TextBatches(
                source,
                tokenizer,
                rows=2,
                positions=255,
                rank=rank,
                world_size=world,
                streaming=True,
                num_workers=workers,
                prefetch=1 if workers else 0,
            )
            for batch in batches.take(count):
                text = "".join(tokenizer.batch_decode(batch["input_ids"]))
                seen |= {piece.split(" counted")[0] for piece in text.split("<|bos|>Cat ") if " counted" in piece}
        return seen

    held = marks(SourceConfig(path=str(start / "hub"), rows=20), 2)
    trained = marks(SourceConfig(path=str(start / "hub"), start=20), 12)
    assert held and len(trained) > 50 and not held & trained


def test_outlook_counts_what_cropping_drops(tokenizer, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"text": "a" * 100}) + "\n" for _ in range(40))
    )  # 100 letters, no merge

    def look(mode, positions=49):
        return TextBatches(
            SourceConfig(path=str(tmp_path / "t.jsonl")), tokenizer, rows=1, positions=positions, mode=mode
        ).outlook(500)

    length = len(tokenizer.encode("a" * 100, add_special_tokens=False)) + 1
    assert look("keep") == 0 and look("crop") == pytest.approx(1 - 50 / length, abs=0.02)


def test_sizes_without_memory_are_those_of_the_model_and_match_the_measured_peaks():
    config = scaling.model_config(4, 300, 64)
    real, empty = NanochatForCausalLM(config), scaling.skeleton(config)
    assert scaling.parameter_counts(real) == scaling.parameter_counts(empty) and empty.lm_head.weight.is_meta
    for depth, rows, measured in ((12, 64, 36.3), (20, 32, 57.2)):  # GiB, docs/records/2026-11-26-gradients-in-products
        model = scaling.skeleton(scaling.model_config(depth, 32768))
        assert scaling.memory_per_gpu(model, rows, 2048)["total"] == pytest.approx(measured, rel=0.02)
    d12 = scaling.skeleton(scaling.model_config(12, 32768))
    assert scaling.memory_per_gpu(d12, 32, 2048)["optimizer"] == pytest.approx(1.82, abs=0.01)  # measured too
    assert scaling.memory_per_gpu(d12, 32, 2048, 8)["optimizer"] == pytest.approx(1.82 / 8, abs=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("h100", 989e12),
    ],
)
def test_a_device_with_a_like_name_has_no_peak_of_another(name, peak):
    assert scaling.peak_of(name) == peak


def test_the_horizon_takes_the_first_that_is_given():
    given = dict(num_steps=7, target_flops=6e9, ratio=10.0)
    assert scaling.training_horizon(1000, 3e3, 100, **given) == 7
    assert scaling.training_horizon(1000, 3e3, 100, **given | {"num_steps": None}) == 20_000
    assert scaling.training_horizon(1000, 3e3, 100, ratio=10.0) == 100
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="--target-flops .* must be above 0"):
            scaling.training_horizon(1000, 3e3, 100, target_flops=bad)


def test_the_plan_prints_what_training_prints(start, tmp_path, capsys):
    from nanochat_hf.cli import plan

    flags = [
        "--depth",
        "2",
        "--aspect-ratio",
        "32",
        "--head-dim",
        "32",
        "--max-seq-len",
        "32",
        "--device-batch-size",
        "4",
        "--num-steps",
        "3",
    ]
    plan.main([*flags, "--gpus", "1", "--vocab-size", "280"])
    planned = capsys.readouterr().out.splitlines()
    run = base(start, tmp_path / "run", tmp_path / "log", plan_only=True)
    assert run.wait() == [0]
    for name in ("parameters", "compute", "steps"):
        line = next(x for x in planned if x.strip().startswith(name))
        assert line in run.text().splitlines(), (line, run.text())
    plan.main(["--depth", "4,12,26", "--gpus", "8", "--mfu", "0.5", "--price", "2"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["4", "12", "26"] and rows[1][1] == "286.3 M" and rows[2][5].endswith("*")
    hours = float(rows[2][4]) / (8 * 989e12 * 0.5) / 3600
    assert float(rows[2][6].removesuffix(" h")) == pytest.approx(hours, rel=5e-3) and float(
        rows[2][7]
    ) == pytest.approx(16 * hours, rel=5e-3)
    with pytest.raises(SystemExit):
        plan.main(["--gpu", "abacus"])
    assert "--gpu abacus is unknown; choose from b200" in capsys.readouterr().err


def test_the_experiments_arms_differ_in_the_matrices_rule_alone():
    from scripts.experiments import muon_vs_adamw as experiment

    config = experiment.ExperimentConfig(data="t", validation="v", output="runs/x", num_steps=100)
    tried = [
        {"matrix_lr": lr, "bpb": [[0, 3.0], [25, last]]} for lr, last in ((0.001, 1.7), (0.002, 1.5), (0.004, 1.6))
    ]
    arms = experiment.full_arms(config, 100, {"lr-search": tried})
    muon, adamw = (experiment.command(config, name, differing, "tok") for name, differing in arms.items())
    muon, adamw = (dict(zip(c[3::2], c[4::2], strict=True)) for c in (muon, adamw))
    assert {flag for flag in {*muon, *adamw} if muon.get(flag) != adamw.get(flag)} == {
        "--output-dir",
        "--matrix-optimizer",
        "--matrix-lr",
        "--weight-decay",
    }
    assert (adamw["--matrix-optimizer"], adamw["--matrix-lr"], adamw["--num-steps"], adamw["--warmup-steps"]) == (
        "adamw",
        "0.002",
        "100",
        "2",
    )
    assert [differing["num_steps"] for differing in experiment.search_arms(config, 100).values()] == [25] * 4
    with pytest.raises(ValueError, match="no learning rate for AdamW; give --adamw-lr"):
        experiment.full_arms(config, 100, {})
