"""Which process owns what, and the gathering of what each has computed.

Gradients arrive already reduced (DDP, FSDP2 and XLA do that), so only new values travel: every process ends the step
with the owner's exact bits.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Shard:
    """This process's place among `world` processes that divide a list between them."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Shard":
        """The place in the default process group; alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def chunk(self, count: int) -> int:
        """The largest share of `count` things: `Shard(0, 3).chunk(7) → 3`."""
        return -(-count // self.world)

    def span(self, count: int) -> tuple[int, int]:
        """This process's half-open share: `Shard(2, 3).span(7) → (6, 7)`; may be empty."""
        chunk = self.chunk(count)
        return min(self.rank * chunk, count), min((self.rank + 1) * chunk, count)


def all_agree(ok: torch.Tensor, shard: Shard) -> torch.Tensor:
    """A 0-d bool that is true only where it is true on every process."""
    if shard.world == 1:
        return ok
    flag = ok.to(torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag.bool()


def start_gather(mine: torch.Tensor, count: int, shard: Shard):
    """Begin to gather shares along axis 0: (share, …) per process → callable that waits, and returns (count, …)."""
    if shard.world == 1:
        return lambda: mine
    chunk = shard.chunk(count)
    send = mine.contiguous()
    if send.shape[0] != chunk:  # collectives want equal shares; the padding is cut off again
        send = torch.zeros(chunk, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        send[: mine.shape[0]].copy_(mine)
    received = torch.empty(chunk * shard.world, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    work = gather(received, send, async_op=True)

    def wait():
        work.wait()
        return received[:count]

    wait.keeps = send  # the collective reads it until it is done
    return wait


def fit_rows(saved: torch.Tensor, shape, span, name: str) -> torch.Tensor:
    """A saved state as the `shape` that this process holds: as it is, or the rows `span` of the whole.

    Raises ValueError if it is neither.
    """
    if tuple(saved.shape) == tuple(shape):
        return saved
    low, high = span
    if saved.ndim and saved.ndim == len(shape) and saved.shape[1:] == tuple(shape)[1:] and saved.shape[0] >= high:
        return saved[low:high]
    raise ValueError(
        f"optimizer state of {name} has shape {tuple(saved.shape)}, this process holds {tuple(shape)}; "
        "save with full_state_dict() and load that"
    )


def is_dtensor(tensor) -> bool:
    """Whether FSDP2 has split this tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; of a DTensor by a collective that all processes must join."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_piece(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's piece of a whole `value`, laid out as `like`; no communication."""
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole_like(piece: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor whose local pieces are laid out as the DTensor `like`."""
    from torch.distributed.tensor import DTensor

    full = DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return full.full_tensor()
