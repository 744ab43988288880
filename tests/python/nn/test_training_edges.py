"""What a training step refuses before it writes anything, and options assigned to a module that trains."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch

import coldrow
from coldrow.nn import Embedding, EmbeddingBag, Table, TableBatchedEmbeddingBags, clip_grad_norm_

GATED = coldrow.RowUpdate(coldrow.SGD(lr=1.0), coldrow.EpochGated(coldrow.Constant(0.1)))
SGD = coldrow.RowUpdate(coldrow.SGD(lr=1.0))


def one(update=SGD, **options) -> TableBatchedEmbeddingBags:
    torch.manual_seed(0)
    return TableBatchedEmbeddingBags([Table("a", 6, 3)], update, **options)


def batch(*ids: int):
    return torch.tensor(ids), torch.tensor([0, len(ids)])


# ------------------------------------------------------------------------------------------ warnings


@pytest.mark.parametrize("fused", [True, False])
def test_a_warning_made_an_error_comes_before_anything_is_written(fused):
    emb = one(GATED, fused=fused)
    before = {k: v.clone() for k, v in emb.state_dict().items()}
    version = emb.weights["a"]._version

    def step():
        emb(*batch(0)).sum().backward()
        if not fused:
            emb.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"new_epoch\(\) was never called"):
            step()
        for key, value in emb.state_dict().items():
            assert torch.equal(value, before[key])
        assert emb.weights["a"]._version == version
        with pytest.raises(UserWarning):  # not lost with the first
            step()
        emb.new_epoch()
        emb.zero_grad()
        step()
    assert emb.clock == 1


# ---------------------------------------------------------------------------------- epochs to come


@pytest.mark.parametrize("name", ["apply_", "read_"])
def test_an_epoch_after_the_step_is_refused(name):
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.1), coldrow.EpochReset())
    weight = np.ones((3, 2), np.float32)
    state = coldrow.init_state(update, 3, 2, weight)
    rows = np.array([0])
    coldrow.apply_(update, weight, np.zeros((1, 2), np.float32), rows, state, step=1)
    before = weight.copy()
    row = np.zeros((1, 2), np.float32)
    calls = {
        "apply_": lambda at: coldrow.apply_(update, weight, row, rows, state, **at),
        "read_": lambda at: coldrow.read_(row, update, weight, rows, state, **at),
    }
    with pytest.raises(ValueError, match="epoch_start: got 9, accepted: an integer from 0 to 2"):
        calls[name]({"step": 2, "epoch_start": 9})
    assert (weight == before).all()


def test_a_checkpoint_with_an_epoch_after_the_next_step_is_refused():
    emb = one(GATED)
    state = {k: v.clone() for k, v in emb.state_dict().items()}
    state["epoch_start"].fill_(2)
    with pytest.raises(RuntimeError, match="epoch_start: got 2, accepted: 0 to the step after the"):
        emb.load_state_dict(state)
    state["epoch_start"].fill_(1)
    emb.load_state_dict(state)


# ------------------------------------------------------------------------------------------ autograd


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_double_backward_is_refused_whatever_the_loss(fused, linear):
    emb = one(fused=fused)
    weights = torch.tensor([1.0, 2.0], requires_grad=True)
    out = emb(*batch(0, 1), per_sample_weights=weights)
    loss = out.sum() if linear else out.square().sum()
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    assert torch.isfinite(gradient).all()
    with pytest.raises(RuntimeError, match="trying to differentiate twice"):
        gradient.square().sum().backward()


def test_one_forward_has_one_backward_whatever_the_threads():
    for _ in range(50):
        emb = one()
        out = emb(*batch(0, 1)).sum()
        ready, done = threading.Barrier(4), []

        def run(out=out, ready=ready, done=done):
            ready.wait()
            try:
                out.backward(retain_graph=True)
                done.append("trained")
            except RuntimeError as error:
                done.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done.count("trained") == 1
        assert sum("has had its backward" in said for said in done) == 3
        assert emb.clock == 1


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_with_an_untouched_table(norm_type):
    torch.manual_seed(0)
    tables = [Table("a", 6, 3), Table("b", 6, 3)]
    emb = TableBatchedEmbeddingBags(tables, SGD, fused=False)
    emb(torch.tensor([0, 1]), torch.tensor([0, 2, 2])).sum().backward()
    dense = torch.nn.Parameter(torch.ones(3))
    dense.grad = torch.full((3,), 2.0)
    reference = torch.nn.Parameter(torch.ones(6, 3))
    reference.grad = emb.weights["a"].grad.to_dense()
    expected = torch.nn.utils.clip_grad_norm_([reference, dense], 1.0, norm_type)
    dense.grad = torch.full((3,), 2.0)
    got = clip_grad_norm_([*emb.parameters(), dense], 1.0, norm_type)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(emb.weights["a"].grad.to_dense(), reference.grad)


# -------------------------------------------------------------------------------- padding and offsets


BAD_OFFSETS = {
    "starts": ([1, 2], ValueError, "offsets: starts with 1, accepted: 0"),
    "falls": ([0, 2, 1], ValueError, "offsets: falls to 1 at position 2"),
    "ends": ([0, 1], ValueError, "offsets: ends with 1, accepted: the number of indices, 3"),
}


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_bad_offsets_are_refused_with_and_without_padding(case, padding):
    offsets, error, says = BAD_OFFSETS[case]
    emb = EmbeddingBag(10, 4, mode="sum", padding_idx=padding, include_last_offset=True)
    with pytest.raises(error, match=says):
        emb(torch.tensor([0, 1, 2]), torch.tensor(offsets))
    assert emb.clock == 0


@pytest.mark.parametrize("kind", [Embedding, EmbeddingBag])
def test_a_bad_index_is_named_by_its_position_among_the_padding(kind):
    emb = kind(10, 4, padding_idx=0)
    with pytest.raises(IndexError, match=r"got 99 at position 3 .*accepted: 0 to 9"):
        emb(torch.tensor([[0, 0, 0, 99]]))
    with pytest.raises(IndexError, match=r"got -1 at position 1 .*accepted: 0 to 9"):
        emb(torch.tensor([[0, -1, 0, 99]]))


def test_messages_are_bounded():
    offsets = torch.arange(65536)
    offsets[5] = 10**6
    with pytest.raises(ValueError, match="offsets: falls to") as caught:
        EmbeddingBag(10, 4, padding_idx=0)(torch.ones(65536, dtype=torch.int64), offsets)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
def test_indices_and_offsets_of_two_dtypes(dtypes, padding):
    emb = EmbeddingBag(10, 4, mode="sum", padding_idx=padding)
    expected = emb(torch.tensor([1, 2, 3]), torch.tensor([0, 2]))
    given = torch.tensor([1, 2, 3], dtype=dtypes[0]), torch.tensor([0, 2], dtype=dtypes[1])
    assert torch.equal(emb.eval()(*given), expected)
    if dtypes[1] == torch.int64:
        with pytest.raises(ValueError, match="offsets"):
            emb(given[0], torch.tensor([0, 2**32 + 1]))


# ------------------------------------------------------------------------------------------- options


def test_assigned_options_hold():
    emb = one(coldrow.RowUpdate(coldrow.SGD(lr=0.0), coldrow.Exponential(half_life=1.0)))
    emb(*batch(0)).sum().backward()
    emb.clock = 4
    emb.eval()
    ids = torch.tensor([0, 0]), torch.tensor([0, 2])
    stored = emb.weights["a"][0]
    assert torch.equal(emb(*ids)[0], 2 * stored)
    emb.pooling = "mean"
    assert torch.equal(emb(*ids)[0], stored)
    emb.charge = "read"
    assert torch.equal(emb(*ids)[0], stored * 2.0**-3)
    assert torch.equal(emb.read("a")[0], stored * 2.0**-3)
    emb.output_dtype = torch.bfloat16
    assert emb(*ids).dtype == torch.bfloat16
    for name, value in (("fused", False), ("state_layout", "split"), ("validate", "sync")):
        with pytest.raises(AttributeError, match=f"{name}: is fixed when the module is built"):
            setattr(emb, name, value)
    for name, value in (("pooling", "max"), ("charge", "never"), ("on_nonfinite", 3)):
        with pytest.raises(ValueError, match=f"{name}: got"):
            setattr(emb, name, value)


def test_assigned_update_trains_and_shows():
    emb = one()
    emb.update = coldrow.RowUpdate(coldrow.SGD(lr=1.0), coldrow.Constant(weight_decay=0.5))
    before = emb.weights["a"][0].clone()
    emb(*batch(0)).sum().backward()
    assert torch.equal(emb.weights["a"][0], 0.5 * before - 1.0)
    assert "Constant" in repr(emb)
    with pytest.raises(ValueError, match="update: got one with state"):
        emb.update = coldrow.RowUpdate(coldrow.Adam())
    with pytest.raises(TypeError, match="update: got"):
        emb.update = coldrow.SGD()


def test_mode_of_a_bag_may_be_assigned():
    emb = EmbeddingBag(10, 4, mode="sum")
    total = emb.eval()(torch.tensor([[1, 2]]))
    emb.mode = "mean"
    assert torch.equal(emb(torch.tensor([[1, 2]])), total / 2)
    assert "mode='mean'" in repr(emb)
    with pytest.raises(ValueError, match="mode: got 'max'"):
        emb.mode = "max"


def test_a_table_of_another_shape_in_the_place_of_one_is_refused_by_name():
    emb = Embedding(4, 2)
    emb.weight = torch.nn.Parameter(torch.zeros(9, 2), requires_grad=False)
    with pytest.raises(ValueError, match=r"weights.weight: got \[9, 2\], accepted: \[4, 2\]"):
        emb(torch.tensor([0]))


@pytest.mark.parametrize("given", [None, 3, "x", [], torch.zeros(2)], ids=repr)
def test_what_is_no_state_dict_is_refused_by_name(given):
    emb = one(fused=False)
    sparse = torch.nn.Embedding(3, 2, sparse=True)
    from coldrow.optim import SparseOptimizer

    for target in (emb, emb.optimizer, SparseOptimizer(sparse.parameters(), SGD)):
        with pytest.raises(TypeError, match=r"state_dict: got .*accepted: a mapping"):
            target.load_state_dict(given)


@pytest.mark.parametrize("given", [None, 3, "x", []], ids=repr)
def test_what_is_no_tensor_is_refused_by_name(given):
    with pytest.raises(TypeError, match="embeddings: got"):
        Embedding.from_pretrained(given)
