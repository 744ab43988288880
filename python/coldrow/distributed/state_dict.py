"""Tables and row state of shards as DTensors, so that a checkpoint does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from coldrow.distributed.request import Placement


def shard(
    state_dict: dict[str, Any],
    prefix: str,
    keys: Mapping[str, int],
    placement: Placement,
    mesh: DeviceMesh,
) -> None:
    """Make DTensors of what has one entry per row (they share memory with the tables).

    Args:
        state_dict: changed in place.
        prefix: where its keys begin.
        keys: the keys of what has one entry per row, and of which table.
        placement: of the rows.
        mesh: of the ranks.
    """
    for key, t in keys.items():
        own = state_dict[prefix + key].detach()[: placement.own[t]]
        state_dict[prefix + key] = DTensor.from_local(
            own,
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([placement.whole[t], *own.shape[1:]]),
            stride=own.stride(),
        )


def unshard(
    state_dict: dict[str, Any], prefix: str, keys: Mapping[str, int], placement: Placement
) -> None:
    """Put the rows of this rank in the place of DTensors and of whole tables; see :func:`shard`."""
    for key, t in keys.items():
        given = state_dict.get(prefix + key)
        if not isinstance(given, Tensor) or len(given.shape) == 0:
            continue  # reported by who loads
        if len(given) != placement.whole[t]:
            continue
        if isinstance(given, DTensor):
            sharded = tuple(given.placements) == (Shard(0),)
            if sharded and given.device_mesh.size() == placement.world:
                state_dict[prefix + key] = _padded(placement.own[t], given.to_local())
                continue
            given = given.full_tensor()
        first = placement.first[t]
        own = given[first : first + placement.own[t]]
        state_dict[prefix + key] = _padded(placement.own[t], own)


def _padded(count: int, own: Tensor) -> Tensor:
    """Return the rows of a table that has none here as it is kept: one that nothing refers to."""
    if count > 0 or len(own) > 0:
        return own
    return own.new_zeros(1, *own.shape[1:])
