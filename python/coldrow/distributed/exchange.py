"""What ranks say to each other: rows of arrays, and whether all can go on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DISAGREE = (
    "the ranks differ in clock, lr, epoch, grad_scale, policies, in what they are doing (train, evaluate, "
    "read) or in whether per_sample_weights are given; accepted: the same on all ranks"
)


class Ranks:
    """A process group, as one of its ranks sees it.

    Attributes:
        world: number of ranks.
        rank: of this process.
        wire_bytes: bytes this rank has sent to others, by purpose.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.wire_bytes: Counter[str] = Counter()

    def send(self, purpose: str, data: Tensor, to: Sequence[int], get: Sequence[int]) -> Tensor:
        """Send ``to[r]`` rows of ``data`` to each rank; return the ``get[r]`` that came of each, by rank."""
        shape, dtype = data.shape[1:], data.dtype
        width = data[:1].numel() if len(data) else int(torch.Size(shape).numel())
        # As bytes: not every backend takes every dtype.
        out = data.contiguous().view(len(data), width).view(torch.uint8)
        back = torch.empty(sum(get), out.shape[1], dtype=torch.uint8)
        dist.all_to_all_single(back, out, list(get), list(to), group=self.group)
        self.wire_bytes[purpose] += (len(data) - to[self.rank]) * out.shape[1]
        return back.view(dtype).view(-1, *shape)

    def all_of(self, mine: Any) -> list[Any]:
        """Return what each rank gave, by rank."""
        given: list[Any] = [None] * self.world
        dist.all_gather_object(given, mine, group=self.group)
        return given

    def fail_together(self, error: Exception | None) -> None:
        """Called on all ranks when one has failed: raise everywhere."""
        said = self.all_of(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        rank = next(r for r, s in enumerate(said) if s is not None)
        raise RuntimeError(f"rank {rank} raised, so no rank goes on: {said[rank]}")

    def agree(self, error: Exception | None, mark: int = 0) -> None:
        """Raise on every rank if one has an error, or if their marks differ."""
        status = torch.tensor([error is not None, mark, -mark], dtype=torch.int64)
        dist.all_reduce(status, op=dist.ReduceOp.MAX, group=self.group)
        self.wire_bytes["status"] += status.numel() * 8
        failed, high, low = status.tolist()
        if failed:
            self.fail_together(error)
        if high != -low:
            raise ValueError(DISAGREE)


def hash64(*values: Any) -> int:
    """Return 64 bits that are the same in every process."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
