"""Every optimizer, decay and rounding, and modules in mid-training with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import coldrow
from coldrow import policies

# Constants that no other optimizer has, and an eps that counts beside gradients of about 1/2.
ADAM = {"beta1": 0.8, "beta2": 0.95, "eps": 0.05}
OPTIMIZERS = {
    "SGD": coldrow.SGD(lr=0.03),
    "RowwiseRMSprop": coldrow.RowwiseRMSprop(lr=0.02, eps=0.05, ema_beta=0.7),
    "RowwiseAdagrad": coldrow.RowwiseAdagrad(lr=0.04, eps=0.07),
    "Adagrad": coldrow.Adagrad(lr=0.035, eps=0.06),
    "Adam": coldrow.Adam(lr=0.031, **ADAM),
    "Adam by row": coldrow.Adam(lr=0.028, **ADAM, bias_correction="row"),
    "PartialRowwiseAdam": coldrow.PartialRowwiseAdam(lr=0.032, **ADAM),
    "PartialRowwiseAdam by row": coldrow.PartialRowwiseAdam(
        lr=0.038, **ADAM, bias_correction="row"
    ),
}
# What the optimizer keeps beside prev_iter, in order: arrays [rows], then arrays [rows, dim].
STATES = {
    "SGD": ([], []),
    "RowwiseRMSprop": (["momentum1"], []),
    "RowwiseAdagrad": (["momentum1"], []),
    "Adagrad": ([], ["momentum1"]),
    "Adam": ([], ["momentum1", "momentum2"]),
    "Adam by row": (["touches"], ["momentum1", "momentum2"]),
    "PartialRowwiseAdam": (["momentum2"], ["momentum1"]),
    "PartialRowwiseAdam by row": (["momentum2", "touches"], ["momentum1"]),
}
# Such that with the lr above no factor between 0 and 0.1 comes about: see support.check_step.
UNGATED = [
    coldrow.LinearClipped(alpha=2.0, min_shrinkage=0.5),
    coldrow.LinearClipped(alpha=20.0, min_shrinkage=0.0),
    coldrow.CumulativeLinear(alpha=0.02),
    coldrow.CumulativeLinear(half_life=4.0),
    coldrow.CumulativeLinear(alpha=1e-9),
    coldrow.Exponential(weight_decay=3.0),
    coldrow.Exponential(half_life=5.0),
    coldrow.Constant(weight_decay=8.0),
]
DECAYS = [
    coldrow.NoDecay(),
    *UNGATED,
    *map(coldrow.EpochGated, UNGATED),
    coldrow.EpochReset(),
]
ROUNDINGS = [coldrow.Nearest(), coldrow.Stochastic(seed=21)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
both_layouts = pytest.mark.parametrize("layout", ["record", "split"])


def shapes_of(name: str, rows: int, dim: int) -> dict[str, tuple[int, ...]]:
    """The state's shapes by name, in order, prev_iter included."""
    by_row, by_element = STATES[name]
    return dict.fromkeys(["prev_iter", *by_row], (rows,)) | dict.fromkeys(by_element, (rows, dim))


def subclasses(base: type) -> set[type]:
    return {
        kind
        for kind in vars(policies).values()
        if isinstance(kind, type) and issubclass(kind, base) and dataclasses.is_dataclass(kind)
    }


# -------------------------------------------------------------------------------------------- state


def snapshot(emb) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in emb.state_dict().items() if k != "_extra_state"}


def assert_same(one: dict, other: dict) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for key in one:
        a, b = one[key], other[key]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        bits = [x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)]
        assert torch.equal(*bits), key


# ------------------------------------------------------------------------------------ SparseOptimizer


def touch(layer, owner, seed: int) -> None:
    """One step; owner: what steps, the module itself or its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    out = layer(torch.randint(9, (6,), generator=generator), torch.tensor([0, 2, 5, 6]))
    owner.zero_grad()
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    owner.step()
