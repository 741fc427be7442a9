"""The gradient of a step does not depend on how its rows are split into micro-batches and processes."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from nanochat_hf import NanochatConfig, NanochatForCausalLM
from nanochat_hf.data.planned import SFTBatches
from nanochat_hf.data.sources import SourceConfig
from nanochat_hf.optim import MuonAdamW, build_param_groups
from nanochat_hf.tokenizer import train_tokenizer
from nanochat_hf.training.trainer import Trainer
from tests.support.processes import on_ranks

ALONE = ((8, 1), (4, 2), (1, 8))  # rows of a micro-batch × micro-batches: the same eight rows
PAIR = ((4, 1), (1, 4))  # on each of two processes
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("gradient") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} " * (i % 7 + 1)}]
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def gradient(chats, rows, accumulation, dtype):
    """{name: the gradient that the optimizer would see} of one step, on this process of however many there are."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False),
    )
    tokenizer = train_tokenizer(["The cat sat on the mat and counted 12 letters."] * 9, 270)
    torch.manual_seed(0)
    model = NanochatForCausalLM(
        NanochatConfig(
            vocab_size=270, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is zero, so that every path matters
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = SFTBatches(
        [SourceConfig(path=str(chats))], tokenizer, rows=rows, positions=48, rank=rank, world_size=world, prefetch=0
    )
    trainer = Trainer(
        accelerator,
        model.to(dtype),
        MuonAdamW(build_param_groups(model)),
        batches,
        num_steps=1,
        schedule=lambda optimizer, step: 1.0,
    )
    assert (type(trainer.model).__name__ == "DistributedDataParallel") == (world > 1)
    trainer.optimizer.step = trainer.optimizer.zero_grad = lambda **how: None
    trainer.fit()
    counts = [int((batch["shift_labels"] != -100).sum()) for batch in batches.take(accumulation)]
    assert accumulation == 1 or len(set(counts)) > 1  # micro-batches of unequal weight, or the test proves nothing
    return {name: parameter.grad.double() for name, parameter in trainer.raw_model.named_parameters()}


def rank_of_two(rank, world, chats, folder):
    found = {(shape, dtype): gradient(chats, *shape, dtype) for shape in PAIR for dtype in DTYPES}
    assert torch.distributed.get_world_size() == world == 2
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def gradients(chats, tmp_path_factory):
    """{(where, rows, accumulation, dtype): gradient}"""
    found = {(f"alone, {shape}", dtype): gradient(chats, *shape, dtype) for shape in ALONE for dtype in DTYPES}
    folder = tmp_path_factory.mktemp("pair")
    on_ranks(rank_of_two, 2, chats, folder)
    for rank in range(2):
        for (shape, dtype), value in torch.load(folder / f"{rank}.pt", weights_only=False).items():
            found[f"rank {rank} of 2, {shape}", dtype] = value
    return found


# The residual scalars are sums over all positions and channels that cancel to a fiftieth and less of their terms (the
# norms behind them make the model nearly indifferent to the scale of the residual stream), and the terms carry
# float32's rounding of every layer: the scalars are known to some 1e-5, however they are summed (sums in float64 were
# tried, and left them there). In a float64 model they agree too: the split adds no error.
@pytest.mark.parametrize("dtype, matrices, scalars", [(torch.float32, 1e-6, 1e-4), (torch.float64, 1e-6, 1e-12)])
def test_the_split_does_not_matter(gradients, dtype, matrices, scalars):
    expected = gradients["alone, (8, 1)", dtype]
    others = {where: value for (where, kind), value in gradients.items() if kind == dtype}
    assert len(others) == len(ALONE) + 2 * len(PAIR)
    for where, other in others.items():
        for name, value in expected.items():
            apart = ((other[name] - value).norm() / value.norm()).item()
            assert apart <= (scalars if value.ndim < 2 else matrices), (where, name, apart)
