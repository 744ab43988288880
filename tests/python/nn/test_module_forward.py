"""TableBatchedEmbeddingBags: what a forward returns."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from module_cases import (  # noqa: E402
    FEATURES,
    assert_same,
    copies,
    make,
    make_batch,
    per_feature,
    snapshot,
    torch_bags,
)
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_pooled_forward_equals_torch(pooling, dtype, fused):
    emb = make(pooling=pooling, fused=fused)
    batch = make_batch(dtype=dtype)
    empty = (batch[1].diff() == 0).view(3, 3).T  # [bag, feature]
    assert empty.any()
    out = emb(*batch)
    assert out.shape == (3, 4 + 4 + 6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.cat(torch_bags(emb.weights, *batch, pooling), 1))
    for f, part in enumerate(out.split([4, 4, 6], 1)):
        assert not part[empty[:, f]].any()
        assert part[~empty[:, f]].all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64, torch.bfloat16])
def test_weighted_forward_equals_torch(weights, fused):
    emb, batch = make(fused=fused), make_batch()
    psw = torch.linspace(-1, 1, batch[0].numel()).to(weights)
    want = torch.cat(torch_bags(emb.weights, *batch, psw=psw.float()), 1)
    torch.testing.assert_close(emb(*batch, psw), want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_unpooled_forward_equals_torch(dtype):
    batch = make_batch(dtype=dtype)
    emb = make(pooling="none", dims={"a": 5, "b": 5})
    parts = [
        F.embedding(i, emb.weights[table])
        for table, (i, _, _) in zip(FEATURES, per_feature(*batch), strict=True)
    ]
    assert torch.equal(emb(*batch), torch.cat(parts))


def test_unpooled_forward_of_different_widths_gives_one_tensor_per_feature():
    emb, batch = make(pooling="none"), make_batch()
    out = emb(*batch)
    assert [part.shape[1] for part in out] == [4, 4, 6]
    for part, table, (i, _, _) in zip(out, FEATURES, per_feature(*batch), strict=True):
        assert torch.equal(part, F.embedding(i, emb.weights[table]))


@pytest.mark.parametrize("output", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_output_dtype(pooling, dtype, output):
    emb = make(dtype=dtype, output_dtype=output, pooling=pooling, dims={"a": 4, "b": 4})
    batch = make_batch()
    out = emb(*batch)
    assert out.dtype == output
    weights = {name: p.float() for name, p in emb.weights.items()}
    want = torch.cat(torch_bags(weights, *batch), 1)
    if pooling == "none":
        parts = zip(FEATURES, per_feature(*batch), strict=True)
        want = torch.cat([weights[table][i] for table, (i, _, _) in parts])
    torch.testing.assert_close(out, want.to(output))
    out.sum().backward()
    assert emb.clock == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
@pytest.mark.parametrize("bags", [(2, 5, 1), (0, 3, 2), (1, 0, 0)])
def test_batch_sizes_equal_a_loop_over_the_features(bags, pooling, fused):
    emb = make(pooling=pooling, fused=fused, dims={"a": 4, "b": 4} if pooling == "none" else None)
    batch = make_batch(seed=3, bags=bags)
    out = emb(*batch, batch_sizes=bags)
    if pooling == "none":
        parts = zip(FEATURES, per_feature(*batch, bags), strict=True)
        want = torch.cat([emb.weights[table][i] for table, (i, _, _) in parts])
    else:
        parts = torch_bags(emb.weights, *batch, pooling, bags=bags)
        want = torch.cat([part.reshape(-1) for part in parts])  # flat, feature-major
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_equal_batch_sizes_train_as_no_batch_sizes(pooling):
    one, other = make(pooling=pooling), make(pooling=pooling)
    for seed in range(3):
        batch = make_batch(seed)
        flat = one(*batch, batch_sizes=[3, 3, 3])
        plain = other(*batch)
        if pooling == "sum":
            split = flat.split([12, 12, 18])
            flat = torch.cat([p.view(3, -1) for p in split], 1)
        for out in (flat, plain):
            parts = out if isinstance(out, list) else [out]
            sum(p.square().sum() for p in parts).backward()
    assert_same(snapshot(one), snapshot(other))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("pooling", ["sum", "none"])
def test_empty_batch(pooling, fused):
    emb = make(pooling=pooling, fused=fused)
    before = copies(emb)
    out = emb(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    parts = out if isinstance(out, list) else [out]
    assert [p.shape[0] for p in parts] == [0] * len(parts)
    sum(p.sum() for p in parts).backward()
    if not fused:
        emb.step()
    assert emb.clock == 1
    assert_same(copies(emb), before)


def test_batch_of_empty_bags():
    emb = make()
    before = copies(emb)
    out = emb(torch.empty(0, dtype=torch.int64), torch.zeros(7, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 14))
    out.sum().backward()
    assert emb.clock == 1
    assert_same(copies(emb), before)


def test_arguments_that_are_not_contiguous_are_read_as_they_are():
    emb, (indices, offsets) = make(), make_batch()
    want = emb(indices, offsets).detach().clone()
    wide = [x.repeat_interleave(2)[::2] for x in (indices, offsets)]
    assert not wide[0].is_contiguous()
    assert torch.equal(emb.eval()(*wide), want)


def test_init():
    def ramp(weight):
        weight.copy_(torch.arange(weight.numel()).view(weight.shape))

    torch.manual_seed(0)
    emb = TableBatchedEmbeddingBags(
        [Table("a", 3, 2, init=ramp), Table("b", 5000, 16), Table("c", 3, 2, init=nn.init.zeros_)]
    )
    assert emb.weights["a"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert 0.24 < emb.weights["b"].max() <= 0.25
    assert -0.25 <= emb.weights["b"].min() < -0.24
    assert not emb.weights["c"].any()
