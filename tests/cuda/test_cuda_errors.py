"""What is refused on a GPU: nothing is written, and the error says which table, position and value."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DEFERRED, Batches, assert_same, contents, module

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags


def step(emb, batch):
    emb(*batch).sum().backward()


def refused(emb, call, error, match):
    """``call`` raises at once on a CPU and with validate="sync"; else the next check() does, once."""
    if not DEFERRED or emb.validate == "sync":
        with pytest.raises(error, match=match):
            call()
    else:
        call()
        with pytest.raises(error, match=match):
            emb.check()
    emb.check()


@pytest.mark.parametrize("value", [-1, 7, 2**31 - 1, 2**31, 2**62, -(2**63)])
@pytest.mark.parametrize("validate", ["deferred", "sync"])
def test_a_bad_index(device, validate, value):
    """7 is the number of rows of table b. Never taken for another row."""
    emb = module(device, validate=validate)
    batches = Batches(emb)
    indices, offsets, _ = batches.draw()
    position = int(offsets[2 * batches.bags]) + 3  # the third feature's: table b
    indices[position] = value
    before = contents(emb)
    message = rf"(?s)(?=.*\bb\b)(?=.*{position})(?=.*{value})"  # table, position, value
    refused(emb, lambda: step(emb, (indices, offsets)), IndexError, message)
    assert_same(contents(emb), before)
    assert emb.clock == 0

    good = batches.draw()
    emb(*good).sum().backward()
    emb.check()
    assert emb.clock == 1


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_first_bad_index_counts(device, index_dtype):
    emb = module(device)
    indices, offsets, _ = Batches(emb).draw(index_dtype=index_dtype)
    indices[11] = -5
    indices[4] = 300
    indices[90:] = 2**30
    message = r"(?s)(?=.*\ba\b)(?=.*\b4\b)(?=.*300)"
    refused(emb, lambda: step(emb, (indices, offsets)), IndexError, message)


@pytest.mark.parametrize(
    ("where", "change"),
    [(0, 1), (50, 10**6), (70, -(10**6)), (-1, 1)],
    ids=["start", "up", "down", "end"],
)
def test_bad_offsets(device, where, change):
    emb = module(device)
    indices, offsets, _ = Batches(emb).draw()
    offsets[where] += change
    before = contents(emb)
    refused(emb, lambda: step(emb, (indices, offsets)), ValueError, "offsets")
    assert_same(contents(emb), before)
    assert emb.clock == 0


@pytest.mark.skipif(not DEFERRED, reason="a CPU raises at once")
def test_a_bad_batch_gives_zeros_and_later_batches_train(device):
    """A deferred error hides nothing of what comes after: it equals a run without the bad batch."""
    emb, other = module(device), module(device)
    batches = Batches(emb)
    for s in range(6):
        batch = batches.draw()
        grad = None
        if s == 2:
            bad = batch[0].clone()
            bad[0] = -1
            out = emb(bad, *batch[1:])
            out.sum().backward()
            assert not out.detach().any()
            continue
        for e in (emb, other):
            out = e(*batch)
            grad = batches.grad_for(out) if grad is None else grad
            out.backward(grad)
    assert_same(contents(emb), contents(other))
    assert emb.clock == other.clock == 5
    with pytest.raises(IndexError, match="-1"):
        emb.check()


def poisoned(device, mode, **options):
    """A module, its tables, and a step in which row 3 of table b gets an infinite gradient."""
    emb = module(device, on_nonfinite=mode, **options)
    bags = 40
    n = 4 * bags
    indices = torch.zeros(n, dtype=torch.int64, device=device)
    indices[: 2 * bags] = torch.arange(2 * bags, device=device)
    indices[2 * bags : 3 * bags] = torch.arange(bags, device=device) % 7

    def step():
        out = emb(indices, torch.arange(n + 1, device=device))
        grad = torch.ones_like(out)
        grad[3, 128:192] = float("inf")
        out.backward(grad)

    return emb, contents(emb), step


def test_nonfinite_skip(device):
    emb, before, step = poisoned(device, "skip")
    step()
    emb.check()
    after = contents(emb)
    assert int(emb.nonfinite_rows) == 1
    assert emb.clock == 1
    for name in ("b", "b.momentum1", "b.prev_iter"):
        assert torch.equal(after[name][3], before[name][3])
        assert not torch.equal(after[name][2], before[name][2])
    assert all(t.isfinite().all() for t in after.values())


@pytest.mark.parametrize("validate", ["deferred", "sync"])
def test_nonfinite_raise(device, validate):
    emb, before, step = poisoned(device, "raise", validate=validate)
    refused(emb, step, ValueError, r"(?s)(?=.*\bb\b)(?=.*\b3\b)")
    assert_same(contents(emb), before)
    assert emb.clock == 0


def test_nonfinite_propagate(device):
    emb, _, step = poisoned(device, "propagate")
    step()
    emb.check()
    after = contents(emb)
    assert emb.clock == 1
    assert int(after["b.prev_iter"][3]) == 1
    assert not after["b"][3].isfinite().all()
    rest = [r for r in range(7) if r != 3]
    assert after["b"][rest].isfinite().all()


class TestFunctions:
    """The functional calls raise themselves, before anything is written."""

    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5))

    def arrays(self, device, rows=6, dim=8, n=4):
        weight = torch.ones(rows, dim, device=device)
        state = coldrow.init_state(self.update, rows, dim, like=weight)
        grad = torch.ones(n, dim, device=device)
        return weight, grad, torch.arange(n, device=device), state

    def refuse(self, error, match, weight, grad, indices, state, **options):
        before = weight.clone(), {k: v.clone() for k, v in state.items()}
        with pytest.raises(error, match=match):
            coldrow.apply_(self.update, weight, grad, indices, state, **{"step": 5, **options})
        torch.cuda.is_available() and torch.cuda.synchronize()
        assert torch.equal(weight, before[0])
        assert all(torch.equal(state[k], before[1][k]) for k in state)

    @pytest.mark.parametrize("value", [-1, 6, 2**40])
    def test_index(self, device, value):
        weight, grad, indices, state = self.arrays(device)
        indices[2] = value
        self.refuse(IndexError, rf"(?s)(?=.*\b2\b)(?=.*{value})", weight, grad, indices, state)

    def test_nonfinite(self, device):
        weight, grad, indices, state = self.arrays(device)
        grad[1, 3] = float("nan")
        self.refuse(ValueError, "finite", weight, grad, indices, state)
        coldrow.apply_(self.update, weight, grad, indices, state, step=5, on_nonfinite="skip")
        assert state["prev_iter"].tolist() == [5, 0, 5, 5, 0, 0]

    def test_step_that_does_not_advance(self, device):
        weight, grad, indices, state = self.arrays(device)
        state["prev_iter"][2] = 9
        self.refuse(ValueError, "step", weight, grad, indices, state)
        self.refuse(ValueError, "step", weight, grad, indices, state, step=9)
        coldrow.apply_(self.update, weight, grad, indices, state, step=10)
        assert state["prev_iter"].tolist() == [10, 10, 10, 10, 0, 0]

    @pytest.mark.cuda_only
    @pytest.mark.parametrize("which", ["weight", "grad", "indices", "momentum1", "prev_iter"])
    def test_arrays_of_two_devices(self, device, which):
        weight, grad, indices, state = self.arrays(device)
        arrays = {"weight": weight, "grad": grad, "indices": indices, **state}
        arrays[which] = arrays[which].cpu()
        with pytest.raises(ValueError, match=r"(?s)(?=.*cpu)(?=.*cuda)"):
            coldrow.apply_(
                self.update,
                arrays["weight"],
                arrays["grad"],
                arrays["indices"],
                {k: arrays[k] for k in state},
                step=5,
            )

    def test_overlap(self, device):
        weight, _, indices, state = self.arrays(device)
        self.refuse(ValueError, "grad|overlap", weight, weight[:4], indices, state)

    def test_read(self, device):
        weight, _, indices, state = self.arrays(device)
        out = torch.full((4, 8), 7.0, device=device)
        indices[3] = 99
        with pytest.raises(IndexError, match="99"):
            coldrow.read_(out, self.update, weight, indices, state, step=5)


@pytest.mark.cuda_only
def test_batch_on_another_device(device):
    emb = module(device)
    indices, offsets, _ = Batches(emb).draw()
    for batch in ((indices.cpu(), offsets), (indices, offsets.cpu())):
        with pytest.raises((ValueError, TypeError), match=r"(?s)(?=.*cpu)(?=.*cuda)"):
            emb(*batch)
    assert emb.clock == 0


@pytest.mark.cuda_only
def test_a_table_that_does_not_fit(device):
    """torch's own error; nothing is left behind."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        TableBatchedEmbeddingBags([Table("huge", 2**40, 128)], device=device)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.cuda_only
def test_a_workspace_that_does_not_fit(device):
    """The backward's memory is taken before anything is written; afterwards the module trains on."""
    emb = module(device, rows=(1000, 7, 60))
    batches = Batches(emb, bags=20_000, longest=40)
    indices, offsets, _ = batches.draw()
    out = emb(indices, offsets)
    grad = batches.grad_for(out)
    before = contents(emb)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    used = torch.cuda.memory_reserved()
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (used + (1 << 20)) / total))
        with pytest.raises(torch.cuda.OutOfMemoryError):
            out.backward(grad)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(contents(emb), before)
    assert emb.clock == 0
    out = emb(indices, offsets)
    out.backward(grad)
    emb.check()
    assert emb.clock == 1


@pytest.mark.cuda_only
def test_noncontiguous_and_misaligned_arrays(device):
    """What a kernel could not read is refused; what is aligned to its own type only is not."""
    update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.5))
    block = torch.zeros(6 * 8 + 1, device=device)
    weight = block[1:].view(6, 8)  # 4 bytes past an address of 16
    weight.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=(6, 8))))
    plain = weight.clone()
    states = [coldrow.init_state(update, 6, 8, like=weight) for _ in range(2)]
    grad, indices = torch.ones(6, 8, device=device), torch.arange(6, device=device)
    for w, state in zip((weight, plain), states, strict=True):
        coldrow.apply_(update, w, grad, indices, state, step=1)
    assert torch.equal(weight, plain)
    with pytest.raises(ValueError, match="contiguous"):
        coldrow.apply_(update, torch.zeros(8, 6, device=device).T, grad, indices, states[0], step=2)
