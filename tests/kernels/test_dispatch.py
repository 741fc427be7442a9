"""How kernels are chosen: by what fits, with the reason for each operation; and what is asked again at each call."""

import torch

from nanochat_hf import kernels
from nanochat_hf.kernels import dispatch
from nanochat_hf.model.ops_nanochat_hf import PLAIN
from tests.support.kernels import tiny, triton


class Module:
    """A kernel of the squared ReLU, as a file in ops/ would hold it."""

    OP = "squared_relu_mlp"
    __name__ = "ops.twice"
    __doc__ = "Says twice what the formula says.\nMore."

    def __init__(self, rank=0, reason=None, served=True):
        self.RANK, self.fits, self.serves = rank, lambda *args: reason, lambda *args: served

    @staticmethod
    def run(*args):
        return 2 * PLAIN.squared_relu_mlp(*args)


def chosen(monkeypatch, *modules):
    monkeypatch.setattr(dispatch, "registered", lambda: tuple(sorted(modules, key=lambda module: -module.RANK)))
    return kernels.choose(tiny(), torch.device("cpu"), torch.float32)


def test_the_highest_rank_that_fits_is_chosen_and_reasons_are_told(monkeypatch):
    ops, report = chosen(monkeypatch, Module(), Module(rank=1, reason="made for Hopper"))
    assert (
        report["squared_relu_mlp"] == ("twice", "Says twice what the formula says.")
        and ops.squared_relu_mlp.name == "twice"
    )
    assert ops.mix_and_norm is PLAIN.mix_and_norm and report["mix_and_norm"] == ("formula", "triton is not installed")
    _, report = chosen(monkeypatch, Module(reason="no Triton on cpu"), Module(rank=1, reason="made for Hopper"))
    assert report["squared_relu_mlp"] == ("formula", "twice: made for Hopper; twice: no Triton on cpu")
    lines = kernels.table(report)
    assert len(lines) == len(vars(PLAIN)) and len({line.index("formula") for line in lines}) == 1


def test_calls_that_a_kernel_does_not_serve_go_to_the_formula(monkeypatch):
    model, x = tiny(), torch.randn(2, 8, 64)
    mlp = model.model.layers[0].mlp
    for served, factor in ((True, 2), (False, 1)):
        ops, _ = chosen(monkeypatch, Module(served=served))
        torch.testing.assert_close(ops.squared_relu_mlp(x, mlp.up_proj, mlp.down_proj), factor * mlp(x, PLAIN))


def test_the_model_computes_in_training_by_what_was_chosen_and_else_by_the_formulas(monkeypatch):
    model, ids = tiny(), torch.arange(16).view(2, 8)
    plain = model(ids).logits
    model.model.training_ops, _ = chosen(monkeypatch, Module())
    assert not torch.allclose(model(ids).logits, plain)
    torch.testing.assert_close(model.eval()(ids).logits, plain)


@triton
def test_formulas_that_kernels_do_not_know_keep_their_operation():
    for settings, reason in (
        (dict(rms_norm_eps=1e-6), "rms_norm_eps=1e-06"),
        (dict(rope_in_bfloat16=False), "not rounded"),
        (dict(head_dim=24), "head_dim=24"),
        (dict(final_logit_softcapping=100.0), "final_logit_softcapping=100.0 is above 40.0"),
        (dict(use_value_embeddings=False), "no value embeddings"),
    ):
        _, report = kernels.choose(tiny(**settings), torch.device("cpu"), torch.bfloat16)
        told = [why for name, why in report.values() if name == "formula"]
        assert any(reason in why for why in told), settings


def test_without_a_gpu_nothing_is_available_and_the_reason_is_said():
    assert kernels.available(torch.device("cpu")) == (False, "no Triton on cpu")


def test_a_table_can_be_copied_and_sent_to_other_processes():
    import pickle

    ops, _ = kernels.choose(tiny(), torch.device("cpu"), torch.float32)
    assert pickle.loads(pickle.dumps(ops)) == ops
