"""Sparse embeddings of torch and their training, for the tests of coldrow.optim."""

from __future__ import annotations

import pytest

import coldrow

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from coldrow.optim import SparseOptimizer  # noqa: E402

ROWS, DIM = 12, 5
UPDATE = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1, eps=1e-6, ema_beta=0.9),
    coldrow.LinearClipped(alpha=0.2, min_shrinkage=0.3),
)


def make_embedding(seed: int = 0, dtype=torch.float32) -> nn.Embedding:
    torch.manual_seed(seed)
    return nn.Embedding(ROWS, DIM, sparse=True).to(dtype)


def batches(steps: int, seed: int = 1) -> list[torch.Tensor]:
    """Index tensors [4, 3] with many duplicates."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(ROWS, (4, 3), generator=generator) for _ in range(steps)]


def loss_of(layer: nn.Module, indices: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient differs from row to row and from step to step."""
    out = layer(indices).float()
    scale = torch.linspace(-1, 2, out.numel()).view(out.shape)
    return (out * scale).sum() + out.square().sum()


def train(optimizer, layer, steps) -> None:
    for indices in steps:
        optimizer.zero_grad()
        loss_of(layer, indices).backward()
        optimizer.step()


def sparse(rows: list[int], values: torch.Tensor) -> torch.Tensor:
    """A gradient as torch's embeddings make them: duplicates are not summed."""
    index = torch.tensor([rows])
    return torch.sparse_coo_tensor(index, values, (ROWS, DIM), check_invariants=False)


def assert_equal_state(one: dict, other: dict) -> None:
    """Bit for bit, dtypes included."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


# ---------------------------------------------------------------------------------- not finite


def make_poisoned(on_nonfinite: str, value: float):
    """Gradients for rows 1 and 2 of two layers; row 2 of the second has the value."""
    layers = [make_embedding(0), make_embedding(1)]
    optimizer = SparseOptimizer([p.weight for p in layers], UPDATE, on_nonfinite=on_nonfinite)
    for k, layer in enumerate(layers):
        grad = torch.ones(2, DIM)
        grad[1, 0] = value if k == 1 else 1.0
        layer.weight.grad = sparse([1, 2], grad)
    return layers, optimizer
