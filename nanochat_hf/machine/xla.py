"""The machine: Accelerator, device, peak FLOPS, agreement between ranks, and everything that only XLA (TPU) needs."""

import functools
import os
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, is_torch_xla_available
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class XLAAccelerator(Accelerator):
    """Accelerate on XLA devices, with a mixed precision and masks of packed rows of our own.

    On a TPU Accelerate's mixed_precision="bf16" sets XLA_USE_BF16, which turns the float32 master weights into bfloat16; here it stays
    "no", and autocast lowers the products alone. transformers looks at position_ids to see whether rows are packed, which waits for the
    device at each forward; here the masks come from position_ids unseen, in one fixed shape.
    """

    def __init__(self, *, dtype=None, compile=False, **kwargs):
        """`dtype`: float32, bfloat16 or None (bfloat16). ValueError for what harms the weights or cannot run."""
        for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16"):
            if os.environ.get(name, "0") not in ("", "0"):
                raise ValueError(
                    f"{name}={os.environ[name]} makes bfloat16 of the float32 master weights; unset it, set mixed_precision: no in "
                    "Accelerate's YAML (accelerate_configs/tpu.yaml does), and choose with --dtype"
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
        state.local_process_index = max(
            0, state.local_process_index
        )  # Accelerate has -1 off TPUs, and then prints nothing
        self.autocast_enabled = dtype != "float32"
        super().__init__(mixed_precision="no", **kwargs)

    @property
    def mixed_precision(self):
        """What the products run in; Accelerate's own setting stays "no"."""
        return "bf16" if self.autocast_enabled else "no"

    def autocast(self, autocast_handler=None):
        return torch.autocast("xla", dtype=torch.bfloat16, enabled=self.autocast_enabled)

    def backward(self, loss, **kwargs):
        (loss / as_input(self.gradient_accumulation_steps, loss.device)).backward(**kwargs)

    def prepare_model(self, model, device_placement=None, evaluation_mode=False):
        """Move the model; its forward then runs under `autocast`, with masks made from position_ids where there are any."""
        model = super().prepare_model(model, device_placement, evaluation_mode)
        forward = model.forward

        @functools.wraps(forward)
        def run(*args, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
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


def mark_step(device):
    """On XLA, run what was recorded: the next operations become a program of their own. Elsewhere nothing."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def as_input(number, device):
    """A number that changes, as a program may take it: on XLA a 0-d float32 tensor on the device; elsewhere, and a tensor, as it is.

    XLA bakes single numbers of 0 and 1 into a program and takes equal ones for one input, so that a value which happens to equal
    another makes a new program; it does neither with the elements of a vector.
    """
    if device.type != "xla" or isinstance(number, torch.Tensor):
        return number
    return torch.tensor([float(number)]).to(device).squeeze(0)


def step_by_step(device, items):
    """The items of an iterable, with a mark_step after the work on each, so that a loop is not unrolled into one program."""
    for item in items:
        yield item
        mark_step(device)


def reduce_gradients(accelerator, optimizer):
    """On XLA, average complete gradients over the replicas, once a step, so that norms see the whole; DDP and FSDP2 did it in backward."""
    state = accelerator.gradient_state
    if accelerator.distributed_type != DistributedType.XLA or state.is_xla_gradients_synced:
        return
    import torch_xla.core.xla_model as xm

    gradients = [param.grad for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1.0 / accelerator.num_processes)
    state.is_xla_gradients_synced = True  # Accelerate's optimizer then does not reduce again, and resets it


def enable_checkpointing(model, device):
    """Gradient checkpointing for layers. On XLA its own, with a barrier without which XLA merges the recomputation with the original."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": device.type == "xla"})
    if device.type != "xla":
        return
    from torch_xla.utils.checkpoint import checkpoint

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = functools.partial(
                checkpoint, preserve_rng_state=False
            )  # nothing here is random


def documents(position_ids):
    """Number of the document of each position, (B, T): a new one begins where positions do not go on by one.

    documents([[0, 1, 0, 1, 2]]) → [[0, 0, 1, 1, 1]]
    """
    return F.pad((position_ids.diff(dim=-1) != 1).long(), (1, 0)).cumsum(-1)


def packed_masks(config, position_ids):
    """Boolean masks (B, 1, T, T) by layer type that keep causality, documents and windows; True where a query sees a key."""
    number = documents(position_ids)
    place = torch.arange(position_ids.shape[-1], device=position_ids.device)
    distance = place[:, None] - place[None, :]  # (T, T)
    full = ((number[:, :, None] == number[:, None, :]) & (distance >= 0)).unsqueeze(1)
    masks = {"full_attention": full}
    if "sliding_attention" in config.layer_types:
        masks["sliding_attention"] = full & (distance < config.sliding_window)
    return masks


def pallas_attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, position_ids=None, **kwargs
):
    """XLA's flash kernel for layers without a window; SDPA with the mask for those with one, and for lengths that 128 does not divide.

    query (B, H, T, D), key and value (B, K, T, D) → (B, T, H, D), None. Documents become the kernel's segments.
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


def flash_kernel():
    """(name or None, reason): the TPU's flash attention where it can run, registered with transformers."""
    if not is_torch_xla_available(check_is_tpu=True):
        return None, "no TPU"
    if find_spec("jax") is None:
        return None, "the flash kernel needs jax; pip install 'torch_xla[pallas]'"
    ALL_ATTENTION_FUNCTIONS.register("pallas", pallas_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("pallas", sdpa_mask)
    return "pallas", "segments isolate documents; layers with a window take sdpa"
