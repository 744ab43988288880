"""Autograd knows of what is written in place: by functions and by modules."""

from __future__ import annotations

import pytest

import coldrow

torch = pytest.importorskip("torch")
from array_cases import DIM, ROWS, UPDATE, make_tensors, train  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402


@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_version_of_what_is_written_is_bumped(name):
    tensors = make_tensors()
    before = {key: tensor._version for key, tensor in tensors.items()}
    train(tensors)
    assert tensors[name]._version > before[name]
    assert [tensors[key]._version for key in ("grad", "indices")] == [
        before[key] for key in ("grad", "indices")
    ]


def test_version_of_a_parameter_is_bumped_under_no_grad():
    tensors = make_tensors()
    parameter = torch.nn.Parameter(tensors["weight"])
    before = parameter._version
    with torch.no_grad():
        train(tensors | {"weight": parameter})
    assert parameter._version > before


def test_version_of_the_output_of_a_read_is_bumped():
    tensors = make_tensors()
    out = torch.zeros(3, DIM)
    state = {"prev_iter": tensors["prev_iter"]}
    coldrow.read_(out, UPDATE, tensors["weight"], tensors["indices"], state, step=7)
    assert out._version == 1
    assert tensors["weight"]._version == 0


@pytest.mark.parametrize("name", ["weight", "momentum1"])
def test_autograd_complains_about_a_tensor_saved_before_the_update(name):
    tensors = make_tensors()
    x = torch.ones(tensors[name].shape, requires_grad=True)
    loss = (x * tensors[name]).sum()  # saves it for the gradient of x
    train(tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def make_module(**options) -> TableBatchedEmbeddingBags:
    torch.manual_seed(0)
    return TableBatchedEmbeddingBags([Table("user", ROWS, DIM)], UPDATE, **options)


def run(emb: TableBatchedEmbeddingBags) -> None:
    """One training step."""
    emb(torch.tensor([1, 4, 1]), torch.tensor([0, 2, 3])).sum().backward()
    if not emb.fused:
        emb.step()
        emb.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_version_of_a_module_is_bumped(fused):
    emb = make_module(fused=fused)
    written = [emb.weights["user"], *emb.state["user"].values()]
    before = [t._version for t in written]
    run(emb)
    assert [now._version > then for now, then in zip(written, before, strict=True)] == [True] * 3


@pytest.mark.parametrize("fused", [True, False])
def test_autograd_complains_about_a_table_saved_before_its_update(fused):
    emb = make_module(fused=fused)
    x = torch.ones(ROWS, DIM, requires_grad=True)
    loss = (x * emb.weights["user"]).sum()
    run(emb)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def weighted(emb: TableBatchedEmbeddingBags):
    """A forward whose weights want a gradient, and what that gradient is."""
    weights = torch.ones(2, requires_grad=True)
    out = emb(torch.tensor([1, 4]), torch.tensor([0, 1, 2]), weights)
    return out.sum(), weights, emb.weights["user"].detach()[[1, 4]].sum(1).clone()


def assert_right_or_refused(loss, weights, want) -> None:
    """The gradient belongs to the rows that the forward read, or there is none."""
    try:
        loss.backward()
    except RuntimeError:
        assert weights.grad is None
    else:
        torch.testing.assert_close(weights.grad, want)


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_of_weights_after_a_step_came_between(fused):
    emb = make_module(fused=fused).eval()
    loss, weights, want = weighted(emb)
    run(emb.train())
    assert_right_or_refused(loss, weights, want)


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_of_weights_after_somebody_wrote_to_the_table(fused):
    emb = make_module(fused=fused)
    loss, weights, want = weighted(emb)
    with torch.no_grad():
        emb.weights["user"].mul_(3)
    assert_right_or_refused(loss, weights, want)
