"""What the tests of kernels share: where they run, tiny models, tables of kernels, and the distance of tensors."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from nanochat_hf import NanochatConfig, NanochatForCausalLM, kernels
from nanochat_hf.kernels.dispatch import kernel_of, name_of
from nanochat_hf.kernels.float8 import capable
from nanochat_hf.model.ops_nanochat_hf import PLAIN

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = DEVICE == "cuda"  # there the products are for half precision; Triton's interpreter computes them in float32
KIND, TOLERANCE = (torch.bfloat16, 1e-2) if HALF else (torch.float32, 1e-5)
IDS = 300
CAPABLE = torch.cuda.is_available() and capable(torch.device("cuda"))[0]
FLOAT8_DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not CAPABLE, reason="no CUDA device with float8")),
]
triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: make test-kernels")
# kernels that run wherever Triton or its interpreter does
ANYWHERE = ("mix_and_norm", "stream_and_norm", "rope_norm", "gated_rows", "squared_relu", "softcapped_nll")
ANYWHERE += ("product_into_sum", "rope_operator")


def relative(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def randoms(*shapes, dtype=KIND):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def tiny(device="cpu", **settings):
    """A model of four layers in training, none of whose matrices is zero.

    Some are zero at their initialisation, which leaves most paths without a gradient.
    """
    torch.manual_seed(0)
    sizes = dict(vocab_size=IDS, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config = NanochatConfig(**sizes | dict(max_position_embeddings=32) | settings)
    model = NanochatForCausalLM(config).to(device).train()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch(device="cpu"):
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(IDS, (2, 32), generator=generator) for _ in range(2))
    labels[0, :5] = -100
    positions = torch.stack((torch.arange(32), torch.arange(32) % 16))
    tensors = dict(input_ids=ids, shift_labels=labels, position_ids=positions)
    return {key: value.to(device) for key, value in tensors.items()}


def with_kernels(model, *names):
    """Give `model` the kernels of these names.

    By default those that fit it on a GPU, and those of ANYWHERE by the interpreter.
    """
    if not names and HALF:
        model.model.training_ops, _ = kernels.choose(model, torch.device(DEVICE), torch.bfloat16)
        return model
    modules = [module for module in kernels.registered() if name_of(module) in (names or ANYWHERE)]
    model.model.training_ops = replace(PLAIN, **{module.OP: kernel_of(module) for module in modules})
    return model


def compiled(model):
    """As one graph; the interpreter's kernels run between operators that are not compiled further."""
    torch._dynamo.reset()  # each model is one more version of the same code, and there is a limit
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)


def gradients(model, inputs, call=None):
    """(loss, {name: gradient})."""
    model.zero_grad()
    loss = (model if call is None else call)(**inputs).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}
