"""coldrow.nn.Embedding and EmbeddingBag beside torch's: the same calls, the same results."""

from __future__ import annotations

import copy
import io
import os

import pytest
import torch
from torch import nn

import coldrow
from coldrow.nn import (
    Embedding,
    EmbeddingBag,
    Table,
    TableBatchedEmbeddingBags,
    clip_grad_norm_,
    ignore_in_ddp,
)

SGD = coldrow.RowUpdate(coldrow.SGD(lr=0.1))


def pair(kind, *args, fused=True, **options):
    """torch's module and ours, of one weight, and torch's optimizer."""
    theirs = getattr(nn, kind)(*args, **options)
    ours = {"Embedding": Embedding, "EmbeddingBag": EmbeddingBag}[kind](
        *args, sparse=True, update=SGD, fused=fused, **options
    )
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
    return theirs, ours, torch.optim.SGD(theirs.parameters(), lr=0.1)


def train_both(theirs, ours, optimizer, *batch, steps=3):
    for _ in range(steps):
        a, b = theirs(*batch), ours(*batch)
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        scale = torch.linspace(-1, 1, a.numel()).view(a.shape)
        (a * scale).sum().backward()
        (b * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if not ours.table.fused:
            ours.step()
            ours.table.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-6, check_stride=False)
    assert ours.clock == steps


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("padding_idx", [None, 3, -7])
@pytest.mark.parametrize("shape", [(), (0,), (6,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(shape, padding_idx, fused, dtype):
    theirs, ours, optimizer = pair("Embedding", 9, 5, padding_idx=padding_idx, fused=fused)
    assert ours.padding_idx == theirs.padding_idx
    with torch.no_grad():  # a padding row need not stay zero
        theirs.weight += 1
        ours.weight += 1
    indices = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    train_both(theirs, ours, optimizer, indices)
    if padding_idx is not None:
        assert ours.state["prev_iter"][padding_idx] == 0


def bags(form, size=24):
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(0, 9, (size,), generator=generator)
    if form == "2-D":
        return (flat.view(6, 4),)
    offsets = torch.tensor([0, 5, 5, 6, 20])
    return flat, offsets if form == "offsets" else torch.cat([offsets, torch.tensor([size])])


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("form", ["2-D", "offsets", "last"])
@pytest.mark.parametrize("fused", [True, False])
def test_embedding_bag(form, mode, padding_idx, fused):
    last = form == "last"
    options = {"mode": mode, "padding_idx": padding_idx, "include_last_offset": last}
    train_both(*pair("EmbeddingBag", 9, 5, fused=fused, **options), *bags(form))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("form", ["2-D", "offsets"])
def test_per_sample_weights_and_their_gradient(form, padding_idx):
    theirs, ours, _ = pair("EmbeddingBag", 9, 5, mode="sum", padding_idx=padding_idx)
    indices, *offsets = bags(form)
    a = torch.rand(indices.shape, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    offsets = offsets[0] if offsets else None
    x, y = theirs(indices, offsets, a), ours(indices, offsets, b)
    torch.testing.assert_close(y, x)
    x.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close(b.grad, a.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_the_output_too(dtype):
    emb = EmbeddingBag(9, 5, mode="sum", dtype=dtype)
    out = emb(torch.tensor([[1, 2]]))
    assert emb.weight.dtype == out.dtype == dtype
    out.float().sum().backward()
    assert emb.clock == 1


def test_read_charging_and_epochs():
    update = coldrow.RowUpdate(
        coldrow.SGD(lr=0.0), coldrow.EpochGated(coldrow.Exponential(half_life=1))
    )
    emb = Embedding(4, 3, update=update, charge="read")
    first = emb.weight.detach().clone()
    emb.new_epoch()
    emb(torch.tensor([1])).sum().backward()
    emb.clock = 3
    emb.new_epoch()
    torch.testing.assert_close(emb(torch.tensor([1]))[0], first[1] / 4)
    torch.testing.assert_close(emb(torch.tensor([2]))[0], first[2])


def test_swapping_the_class_is_enough():
    """A model written for torch's module trains with ours, its optimizer over all parameters included."""

    class Model(nn.Module):
        def __init__(self, bag):
            super().__init__()
            torch.manual_seed(0)
            self.bag, self.dense = bag(50, 8, mode="sum", sparse=False), nn.Linear(8, 1)

        def forward(self, x):
            return self.dense(self.bag(x))

    for bag in (nn.EmbeddingBag, EmbeddingBag):
        model = Model(bag)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x = torch.randint(0, 50, (64, 5), generator=torch.Generator().manual_seed(1))
        y = (x.sum(1, keepdim=True) % 2).float()
        losses = []
        for _ in range(60):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


def test_state_dicts_of_torch_and_ours():
    theirs, ours, _ = pair("EmbeddingBag", 9, 5, mode="sum")
    ours(torch.tensor([[1, 2]])).sum().backward()
    fresh = EmbeddingBag(9, 5, mode="sum", update=SGD)
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh.weight, theirs.weight)
    assert fresh.clock == 0
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh.weight, ours.weight)
    assert fresh.clock == 1
    inside = nn.Sequential(EmbeddingBag(9, 5, mode="sum", update=SGD))
    inside.load_state_dict(nn.Sequential(theirs).state_dict())
    assert torch.equal(inside[0].weight, theirs.weight)
    with pytest.raises(RuntimeError, match=r"accepted: torch\.float32"):
        EmbeddingBag(8, 5, mode="sum").load_state_dict(theirs.state_dict())
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(copy.deepcopy(ours).weight, ours.weight)


def test_from_pretrained():
    rows = torch.arange(12.0).view(4, 3)
    frozen = Embedding.from_pretrained(rows)
    out = frozen(torch.tensor([2, 0]))
    assert torch.equal(out, rows[[2, 0]])
    assert not out.requires_grad
    trained = EmbeddingBag.from_pretrained(rows, freeze=False, mode="sum", update=SGD)
    trained(torch.tensor([[1, 2]])).sum().backward()
    assert torch.equal(trained.weight[1], rows[1] - 0.1)
    assert torch.equal(rows, torch.arange(12.0).view(4, 3))


def test_lr_scheduler():
    emb = Embedding(4, 3, update=SGD)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(emb.optimizer, gamma=0.5)
    before = emb.weight.detach().clone()
    for lr in (0.1, 0.05):
        assert emb.lr == pytest.approx(lr)
        emb(torch.tensor([1])).sum().backward()
        scheduler.step()
    torch.testing.assert_close(emb.weight[1], before[1] - 0.15)
    emb.lr = 0.25
    assert emb.lr == 0.25


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: EmbeddingBag(9, 5, mode="max"), ValueError, "mode: got 'max', accepted: 'sum', 'mean'"),
        (lambda: Embedding(9, 5, max_norm=1.0), ValueError, r"max_norm: got 1\.0, accepted: None"),
        (lambda: Embedding(9, 5, norm_type=1.0), ValueError, r"norm_type: got 1\.0, accepted: 2\.0"),
        (lambda: Embedding(9, 5, scale_grad_by_freq=True), ValueError, "scale_grad_by_freq: got True"),
        (lambda: Embedding(9, 5, padding_idx=9), ValueError, "padding_idx: got 9, accepted: an integer from -9"),
        (lambda: Embedding(9, 5, _weight=torch.zeros(9, 4)), ValueError, r"_weight: got \[9, 4\], accepted: \[9"),
        (lambda: Embedding(0, 5), ValueError, "num_embeddings: got 0"),
        (lambda: Embedding(9, 0), ValueError, "embedding_dim: got 0"),
        (lambda: Embedding(9, 5, dtype=torch.float64), ValueError, "float64"),
        (lambda: Embedding(9, 5, nothing=1), TypeError, "nothing"),
        (lambda: Embedding(9, 5)(torch.tensor([9])), IndexError, "indices: got 9 at position 0"),
        (lambda: Embedding(9, 5)(torch.tensor([1.0])), TypeError, "input: got dtype float32"),
        (lambda: EmbeddingBag(9, 5)(torch.tensor([1])), ValueError, r"offsets: got None, accepted: \[B\]"),
        (lambda: EmbeddingBag(9, 5)(torch.tensor([[1]]), torch.tensor([0])), ValueError, "offsets: given with 2-D"),
        (lambda: EmbeddingBag(9, 5)(torch.tensor([1, 2]), torch.tensor([1])), ValueError, "offsets: starts with 1"),
        (lambda: EmbeddingBag(9, 5)(torch.zeros(1, 1, 1).long()), ValueError, r"input: got shape \[1, 1, 1\]"),
        (lambda: EmbeddingBag(9, 5)(torch.tensor([[1]]), None, torch.ones(1, 1)), ValueError,
         "per_sample_weights: given with pooling='mean'"),
        (lambda: EmbeddingBag(9, 5, mode="sum")(torch.tensor([[1]]), None, torch.ones(1)), ValueError,
         r"per_sample_weights: got \[1\], accepted: the shape of input, \[1, 1\]"),
        (lambda: Embedding.from_pretrained(torch.zeros(3)), ValueError, r"embeddings: got \[3\]"),
    ],
)  # fmt: skip
def test_what_is_refused(make, kind, says):
    with pytest.raises(kind, match=says):
        make()


# ------------------------------------------------------------------------------ clipping, and DDP


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_is_that_of_dense_gradients(norm_type):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.EmbeddingBag(9, 5, mode="sum"), nn.Linear(5, 2))
    sparse = nn.Sequential(EmbeddingBag(9, 5, mode="sum", fused=False, update=SGD), nn.Linear(5, 2))
    sparse[0].weight.data.copy_(dense[0].weight.data)
    sparse[1].load_state_dict(dense[1].state_dict())
    x = torch.tensor([[1, 2, 1], [1, 5, 6]])  # row 1 thrice
    for _ in range(2):  # accumulated
        dense(x).square().sum().backward()
        sparse(x).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(dense.parameters(), 0.5, norm_type)
    total = clip_grad_norm_(sparse.parameters(), 0.5, norm_type)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(sparse[0].weight.grad.to_dense(), dense[0].weight.grad)
    torch.testing.assert_close(sparse[1].weight.grad, dense[1].weight.grad)
    sparse[0].step()
    torch.testing.assert_close(
        sparse[0].weight.detach(), (dense[0].weight - 0.1 * dense[0].weight.grad).detach()
    )


def test_clipping_nothing_and_what_is_not_finite():
    assert clip_grad_norm_([torch.zeros(2, requires_grad=True)], 1.0) == 0
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(RuntimeError, match="the norm of the gradients is nan"):
        clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert p.grad[0] == 1
    with pytest.raises(ValueError, match="max_norm: got 0"):
        clip_grad_norm_(p, 0)


class Ranker(nn.Module):
    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(rank)  # every rank has tables and weights of its own to begin with
        self.emb = TableBatchedEmbeddingBags([Table("a", 10, 4)], SGD)
        self.one = Embedding(10, 4, update=SGD)
        self.dense = nn.Linear(8, 1)

    def forward(self, x):
        offsets = torch.arange(len(x) + 1)
        return self.dense(torch.cat([self.emb(x, offsets), self.one(x)], dim=1))


def _rank(rank, world, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    model = Ranker(rank)
    start = [model.emb.weights["a"].clone(), model.one.weight.clone()]
    ignore_in_ddp(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    after = [model.emb.weights["a"].clone(), model.one.weight.clone()]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(3):
        x = torch.tensor([rank, 2 + rank, step])
        wrapped(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(
        {
            "kept": all(map(torch.equal, start, after)),
            "tables": [model.emb.weights["a"].detach(), model.one.weight.detach()],
            "clocks": (model.emb.clock, model.one.clock),
            "dense": model.dense.weight.detach(),
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.barrier()
    # Not by way of destructors: gloo's can wait for a thread that waits for the interpreter's lock.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_ddp_leaves_fused_tables_to_each_rank(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert a["kept"]
    assert b["kept"]
    assert a["clocks"] == b["clocks"] == (3, 3)
    assert torch.equal(a["dense"], b["dense"])
    for mine, theirs in zip(a["tables"], b["tables"], strict=True):
        assert not torch.equal(mine, theirs)


def test_ignored_in_ddp_are_fused_tables_and_the_state_of_all():
    model = nn.ModuleDict(
        {
            "fused": TableBatchedEmbeddingBags([Table("a", 3, 2), Table("b", 3, 2)]),
            "unfused": TableBatchedEmbeddingBags([Table("a", 3, 2)], fused=False),
            "dense": nn.Linear(2, 2),
        }
    )
    ignore_in_ddp(model)
    ignore_in_ddp(model)
    ignored = list(model._ddp_params_and_buffers_to_ignore)
    buffers = [name for name, _ in model.named_buffers()]
    assert len(ignored) == len(set(ignored))
    assert set(ignored) == {"fused.weights.a", "fused.weights.b", *buffers}
    assert "unfused.state.a.prev_iter" in ignored
