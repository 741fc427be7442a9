"""Everything that only XLA (TPU) needs: its Accelerator, its steps, its masks and its attention."""

import functools
import os
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import AutocastKwargs, DistributedType, is_torch_xla_available
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

T = TypeVar("T")


class XLAAccelerator(Accelerator):
    """Accelerate on XLA devices, with its own mixed precision and its own masks for packed rows.

    Mixed precision: on a TPU, Accelerate's mixed_precision="bf16" sets XLA_USE_BF16, which turns the float32 master
    weights into bfloat16. Here Accelerate's setting stays "no", and autocast lowers only the matrix products.
    Masks: transformers reads position_ids on the host to see whether rows are packed, and so waits for the device in
    each forward pass. Here the masks are computed from position_ids on the device, in one fixed shape.

    `dtype` is float32, bfloat16 or None (bfloat16). Raises ValueError for a setting that would harm the weights or that
    XLA cannot run.
    """

    def __init__(self, *, dtype: str | None = None, compile: bool = False, **kwargs: Any):
        for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
            if os.environ.get(name, "0") not in ("", "0"):
                raise ValueError(
                    f"{name}={os.environ[name]} makes bfloat16 of the float32 master weights; unset it, set "
                    "mixed_precision: no in Accelerate's YAML, as accelerate_configs/tpu.yaml does, "
                    "and choose with --dtype"
                )
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("", "no"):
            raise ValueError(
                f"mixed_precision={launched} of the launcher is unsafe on XLA; set it to no and choose with --dtype"
            )
        if dtype in ("float16", "float8"):
            lacking = {"float16": "loss scaling", "float8": "float8 products"}[dtype]
            raise ValueError(f"--dtype {dtype} is not for XLA, which has no {lacking} here; use bfloat16 or float32")
        if compile:
            raise ValueError("--compile true is not for XLA, which compiles every step itself; drop it")
        state = PartialState()
        # off TPUs Accelerate sets -1, and a process with that number prints nothing
        state.local_process_index = max(0, state.local_process_index)
        self.autocast_enabled = dtype != "float32"
        super().__init__(mixed_precision="no", **kwargs)

    @property
    def mixed_precision(self) -> str:
        """The dtype of the matrix products, by Accelerate's name; Accelerate's own setting stays "no"."""
        return "bf16" if self.autocast_enabled else "no"

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> Any:
        """Bfloat16 for the matrix products, unless `dtype` is float32."""
        return torch.autocast("xla", dtype=torch.bfloat16, enabled=self.autocast_enabled)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Divide the loss by the number of micro-batches, which is an input of the program, and run backward."""
        (loss / as_input(self.gradient_accumulation_steps, loss.device)).backward(**kwargs)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> torch.nn.Module:
        """Move the model; its forward then runs under `autocast`, with masks computed from position_ids if given."""
        model = super().prepare_model(model, device_placement, evaluation_mode)
        forward = model.forward

        @functools.wraps(forward)
        def run(
            *args: Any,
            attention_mask: Any = None,
            position_ids: torch.Tensor | None = None,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> Any:
            if attention_mask is None and position_ids is not None and past_key_values is None:
                attention_mask = packed_masks(model.config, position_ids)
            with self.autocast():
                return forward(
                    *args,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                    **kwargs,
                )

        model.forward = run
        return model


def mark_step(device: torch.device) -> None:
    """On XLA, run what was recorded so far; what follows becomes another program. Elsewhere do nothing."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def as_input(number: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """A number that changes from step to step, in the form that does not recompile the program.

    On XLA that is a 0-d float32 tensor on the device, taken from a vector: XLA builds the scalars 0 and 1 into its
    program and merges inputs of equal value, so a plain scalar would give a new program now and then. Elsewhere, and
    for a tensor, the number is returned as it is.
    """
    if device.type != "xla" or isinstance(number, torch.Tensor):
        return number
    return torch.tensor([float(number)]).to(device).squeeze(0)


def step_by_step(device: torch.device, items: Iterable[T]) -> Iterator[T]:
    """Yield the items, and call `mark_step` after the work on each, so that XLA does not unroll the loop."""
    for item in items:
        yield item
        mark_step(device)


def reduce_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """On XLA, average the gradients over the processes once a step, before anything measures their norm.

    Elsewhere do nothing: DDP and FSDP2 average them in backward.
    """
    state = accelerator.gradient_state
    if accelerator.distributed_type != DistributedType.XLA or state.is_xla_gradients_synced:
        return
    import torch_xla.core.xla_model as xm

    gradients = [param.grad for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1.0 / accelerator.num_processes)
    state.is_xla_gradients_synced = True  # so that Accelerate's optimizer does not reduce again; it resets this


def enable_checkpointing(model: PreTrainedModel, device: torch.device) -> None:
    """Turn on gradient checkpointing for the layers.

    On XLA it is torch_xla's own, which has a barrier: without it XLA would merge the recomputation with the original
    computation and keep its results in memory.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": device.type == "xla"})
    if device.type != "xla":
        return
    from torch_xla.utils.checkpoint import checkpoint

    name = "_gradient_checkpointing_func"
    for module in model.modules():
        if hasattr(module, name):
            # nothing in a layer is random, so the state of the random generator need not be kept
            setattr(module, name, functools.partial(checkpoint, preserve_rng_state=False))


def documents(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the documents of packed rows, (B, T) → (B, T): a document ends where the next position is not one higher.

    >>> documents(torch.tensor([[0, 1, 0, 1, 2]])).tolist()
    [[0, 0, 1, 1, 1]]
    """
    return F.pad((position_ids.diff(dim=-1) != 1).long(), (1, 0)).cumsum(-1)


def packed_masks(config: PretrainedConfig, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boolean masks (B, 1, T, T) by layer type; True where a query sees a key.

    A query sees keys of its own document that are not after it and, in a layer of sliding attention, within the window.
    """
    number = documents(position_ids)
    place = torch.arange(position_ids.shape[-1], device=position_ids.device)
    distance = place[:, None] - place[None, :]  # (T, T)
    full = ((number[:, :, None] == number[:, None, :]) & (distance >= 0)).unsqueeze(1)
    masks = {"full_attention": full}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = full & (distance < config.sliding_window)
    return masks


def pallas_attention(  # noqa: PLR0913  transformers prescribes the signature of an attention function
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """XLA's flash attention: query (B, H, T, D), key and value (B, K, T, D) → (B, T, H, D).

    A document becomes a segment of the kernel. Layers with a window, and lengths that are no multiple of 128, are
    outside of what the kernel can do; SDPA with the mask computes those.
    """
    B, H, T, _ = query.shape
    if sliding_window is not None or T % 128 or key.shape[2] != T:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **kwargs)
    from torch_xla.experimental.custom_kernel import flash_attention

    key, value = (t.repeat_interleave(H // t.shape[1], dim=1) for t in (key, value))
    segments = None if position_ids is None else documents(position_ids).to(torch.int32).expand(B, T)
    out = flash_attention(
        query, key, value, causal=True, q_segment_ids=segments, kv_segment_ids=segments, sm_scale=scaling
    )
    return out.transpose(1, 2), None


def flash_kernel() -> tuple[str | None, str]:
    """Register the TPU's flash attention with transformers, if it can run here. Returns its name, or None, and why."""
    if not is_torch_xla_available(check_is_tpu=True):
        return None, "no TPU"
    if find_spec("jax") is None:
        return None, "the flash kernel needs jax; pip install 'torch_xla[pallas]'"
    ALL_ATTENTION_FUNCTIONS.register("pallas", pallas_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pallas", sdpa_mask)
    return "pallas", "segments isolate documents; layers with a window take sdpa"
