"""Which process owns what, and the gathering of what each has computed.

Gradients arrive already averaged (DDP, FSDP2 and XLA do that), so only new values travel. After a step every process
holds the bits that the owner computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Shard:
    """This process's place among `world` processes that divide a list among themselves."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Shard":
        """The place in the default process group; alone if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def chunk(self, count: int) -> int:
        """The largest share of `count` things.

        >>> Shard(0, 3).chunk(7)
        3
        """
        return -(-count // self.world)

    def span(self, count: int) -> tuple[int, int]:
        """This process's share of `count` things, from the first to before the second number. It may be empty.

        >>> Shard(2, 3).span(7)
        (6, 7)
        """
        chunk = self.chunk(count)
        return min(self.rank * chunk, count), min((self.rank + 1) * chunk, count)


def all_agree(ok: torch.Tensor, shard: Shard) -> torch.Tensor:
    """A 0-d bool that is true only if it is true on every process."""
    if shard.world == 1:
        return ok
    flag = ok.to(torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return flag.bool()


class Gathering:
    """Shares along axis 0 on their way, (share, …) on each of several processes: call it to wait for (count, …)."""

    def __init__(self, mine: torch.Tensor, count: int, shard: Shard):
        self.count = count
        chunk = shard.chunk(count)
        self.sent = mine.contiguous()  # the collective reads it until it is done
        if self.sent.shape[0] != chunk:  # collectives want equal shares; the padding is cut off again
            self.sent = torch.zeros(chunk, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
            self.sent[: mine.shape[0]].copy_(mine)
        self.received = torch.empty(chunk * shard.world, *mine.shape[1:], dtype=mine.dtype, device=mine.device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
        self.work = gather(self.received, self.sent, async_op=True)

    def __call__(self) -> torch.Tensor:
        """Wait, and return the whole (count, …)."""
        self.work.wait()
        return self.received[: self.count]


def start_gather(mine: torch.Tensor, count: int, shard: Shard) -> Callable[[], torch.Tensor]:
    """Begin to gather shares along axis 0, (share, …) on each process; the result waits and returns (count, …)."""
    return Gathering(mine, count, shard) if shard.world > 1 else lambda: mine


def fit_rows(saved: torch.Tensor, shape: Sequence[int], span: tuple[int, int], name: str) -> torch.Tensor:
    """A saved state in the `shape` that this process holds: as it is, or the rows `span` of the whole.

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


def is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    """Whether FSDP2 has split this tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; of a DTensor by a collective that all processes must join."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_piece(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole `value`, split as `like` is; no communication."""
    if not is_dtensor(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to_local()


def whole_like(piece: torch.Tensor, like: "DTensor") -> torch.Tensor:
    """The whole tensor whose parts are split as the DTensor `like` is."""
    from torch.distributed.tensor import DTensor

    full = DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return full.full_tensor()
