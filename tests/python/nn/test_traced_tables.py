"""Traced code reads the tables that the module has when it runs: compile, export, functional_call, jit, make_fx."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import coldrow
from coldrow.nn import Embedding, EmbeddingBag, Table, TableBatchedEmbeddingBags

SGD = coldrow.RowUpdate(coldrow.SGD(lr=0.1))
FADING = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.1), coldrow.Exponential(half_life=3.0))
X = torch.tensor([[1, 2], [3, 4]])
Y = torch.tensor([[5, 6], [7, 1]])
IDS, BAGS = torch.tensor([0, 1, 5, 2]), torch.tensor([0, 2, 3, 3, 4])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def bag(**options) -> EmbeddingBag:
    torch.manual_seed(0)
    return EmbeddingBag(10, 4, mode="sum", **{"update": SGD, **options})


def two(**options) -> TableBatchedEmbeddingBags:
    torch.manual_seed(0)
    tables = [Table("a", 9, 4), Table("b", 9, 4)]
    return TableBatchedEmbeddingBags(tables, **{"update": FADING, **options})


def compiled(module):
    return torch.compile(module, backend="aot_eager", fullgraph=True)


def zeros() -> nn.Parameter:
    return nn.Parameter(torch.zeros(10, 4), requires_grad=False)


# ---------------------------------------------------------------------------------- replaced tables


@pytest.mark.parametrize("first", [False, True], ids=["before", "after"])
def test_compiled_code_reads_and_trains_a_replaced_table(first):
    emb = bag()
    program = compiled(emb)
    if first:
        program(X).sum().backward()
    old = emb.weight
    before = old.detach().clone()
    emb.weight = zeros()
    out = program(X)
    assert out.sum() == 0
    out.sum().backward()
    assert torch.equal(old, before)
    assert emb.weight[1, 0].item() == pytest.approx(-0.1)


def test_compiled_code_follows_what_moves_the_tables():
    emb = two(charge="read")
    program = compiled(emb)
    program(IDS, BAGS).sum().backward()
    emb.load_state_dict(two(charge="read").state_dict(), assign=True)
    assert emb.clock == 0
    other = two(charge="read")
    for _ in range(3):
        out, expected = program(IDS, BAGS), other(IDS, BAGS)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
    assert emb.clock == other.clock == 3
    emb.half()
    other.half()
    assert torch.equal(program(IDS, BAGS), other(IDS, BAGS))


def test_compiled_code_follows_options_and_policies():
    emb, other = two(), two()
    program = compiled(emb)
    changes = [
        lambda m: setattr(m, "pooling", "mean"),
        lambda m: setattr(m, "charge", "read"),
        lambda m: setattr(m, "update", coldrow.RowUpdate(coldrow.RowwiseRMSprop(eps=0.1))),
        lambda m: setattr(m, "lr", 0.5),
        lambda m: m.param_groups[0].update(lr=0.25),
    ]
    for change in changes:
        for m, call in ((emb, program), (other, other)):
            change(m)
            call(IDS, BAGS).square().sum().backward()
        for mine, theirs in zip(emb.weights.values(), other.weights.values(), strict=True):
            assert torch.equal(mine, theirs)


def test_numbers_assigned_to_lr_hold_in_a_compiled_loop():
    emb = bag()
    program = compiled(emb)
    moved = []
    for k in range(3):
        emb.optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
        before = emb.weight[1, 0].item()
        program(X).sum().backward()
        emb.optimizer.step()
        moved.append(before - emb.weight[1, 0].item())
    assert moved == pytest.approx([0.1, 0.05, 0.1 / 3], rel=1e-5)


def test_scheduler_in_a_compiled_loop():
    emb, other = two(), two()
    program = compiled(emb)
    rates = []
    for m, call in ((emb, program), (other, other)):
        scheduler = torch.optim.lr_scheduler.StepLR(m.optimizer, 1, gamma=0.5)
        for _ in range(3):
            call(IDS, BAGS).square().sum().backward()
            m.optimizer.step()
            scheduler.step()
        rates.append(m.lr)
    assert rates == pytest.approx([0.0125] * 2)
    assert torch.equal(emb.weights["a"], other.weights["a"])


@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
def test_changing_batch_sizes_in_one_graph(pooling):
    emb, other = two(pooling=pooling), two(pooling=pooling)
    program = compiled(emb)
    ids, offsets = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2, 3])
    for sizes in ([2, 1], [1, 2], [3, 0], (0, 3)):
        out, expected = program(ids, offsets, None, sizes), other(ids, offsets, None, sizes)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
    assert emb.clock == other.clock == 4
    with pytest.raises(Exception, match="batch_sizes: got 2 sizes that add up to 5"):
        program(ids, offsets, None, [4, 1])


# ----------------------------------------------------------------------------------- functional_call


CALLERS = pytest.mark.parametrize(
    "wrap",
    [lambda f: f, lambda f: torch.compile(f, backend="aot_eager")],
    ids=["eager", "compiled"],
)


@CALLERS
@pytest.mark.parametrize("charge", ["touch", "read"])
def test_functional_call_reads_what_it_is_given(wrap, charge):
    emb = bag(update=FADING, charge=charge)
    emb(X).sum().backward()
    emb.eval()
    given = {"table.weights.weight": torch.full((10, 4), 2.0)}
    buffers = {name: b.clone() for name, b in emb.named_buffers()}
    before = {k: v.clone() for k, v in emb.state_dict().items()}
    call = wrap(lambda x, tensors: functional_call(emb, tensors, (x,)))
    out = call(X, given)
    for extra in ({}, buffers):
        other = bag(update=FADING, charge=charge).eval()
        other.load_state_dict(emb.state_dict())
        with torch.no_grad():
            other.weight.fill_(2.0)
        assert torch.equal(call(X, {**given, **extra}), other(X))
    assert torch.equal(out, call(X, given))
    assert torch.equal(emb(X), bag_like(emb, before)(X))
    buffers["table.clock"] += 30  # what is owed by then, of those arrays
    later = call(X, {**given, **buffers})
    assert torch.equal(later, out) == (charge == "touch")
    for key, value in emb.state_dict().items():
        assert torch.equal(value, before[key])


def bag_like(emb, state) -> EmbeddingBag:
    other = bag(update=FADING, charge=emb.table.charge).eval()
    other.load_state_dict(state)
    return other


@CALLERS
def test_functional_call_that_would_train_is_refused(wrap):
    emb = bag()
    given = {"table.weights.weight": torch.zeros(10, 4)}
    call = wrap(lambda x, tensors: functional_call(emb, tensors, (x,)))
    with pytest.raises(Exception, match="weights: got tables that are not Parameters"):
        call(X, given)
    emb.eval()
    with pytest.raises(Exception, match="weights: got tables that are not Parameters"):
        call(X, {"table.weights.weight": torch.zeros(10, 4, requires_grad=True)})
    assert emb.clock == 0


@CALLERS
def test_functional_call_with_other_shapes_is_refused(wrap):
    emb = bag().eval()
    call = wrap(lambda x, tensors: functional_call(emb, tensors, (x,)))
    for wrong in (torch.zeros(10, 3), torch.zeros(10, 4, dtype=torch.float64)):
        with pytest.raises(Exception, match=r"got"):
            call(X, {"table.weights.weight": wrong})


def test_functional_call_of_unfused_tables_gives_gradients():
    emb = bag(fused=False)
    weight = torch.ones(10, 4, requires_grad=True)
    functional_call(emb, {"table.weights.weight": weight}, (X,)).sum().backward()
    expected = torch.zeros(10, 4)
    expected[1:5] = 1
    assert torch.equal(weight.grad.to_dense(), expected)
    assert emb.weight.grad is None


# -------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("charge", ["touch", "read"])
def test_exported_program_has_the_tables_once_and_loads_others(strict, replace, charge):
    emb = bag(update=FADING, charge=charge)
    emb(X).sum().backward()
    if replace:
        emb.weight = nn.Parameter(torch.rand(10, 4), requires_grad=False)
    emb.clock = emb.clock + 4
    emb.eval()
    file = io.BytesIO()
    exported = torch.export.export(emb, (X,), strict=strict)
    torch.export.save(exported, file)
    big = sum(
        t.numel() == 40 for t in (*exported.state_dict.values(), *exported.constants.values())
    )
    assert big == 1
    assert "table.weights.weight" in exported.state_dict
    file.seek(0)
    program = torch.export.load(file).module()
    assert torch.equal(program(X), emb(X))
    state = {k: torch.zeros_like(v) for k, v in program.state_dict().items()}
    program.load_state_dict(state)
    assert not program(X).any()


# --------------------------------------------------------------------------- torch.jit.trace, make_fx


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [Embedding, EmbeddingBag])
@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("fused", [True, False])
def test_jit_trace_records_the_lookup(kind, charge, fused, grad):
    torch.manual_seed(0)
    emb = kind(10, 4, update=FADING, charge=charge, fused=fused)
    model = nn.Sequential(emb, nn.Flatten())
    model(X).sum().backward()
    if not fused:
        emb.step()
        emb.table.zero_grad()
    emb.clock = emb.clock + 3
    model.eval()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, X)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for program in (traced, loaded):
        for x in (X, Y, Y[:1]):
            assert torch.equal(program(x), model(x))
    with torch.no_grad():
        emb.weight.mul_(2)
    assert torch.equal(traced(Y), model(Y))  # the table of the module itself


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("charge", ["touch", "read"])
def test_make_fx_records_the_lookup(mode, charge):
    emb = bag(update=FADING, charge=charge)
    emb(X).sum().backward()
    emb.clock = emb.clock + 3
    emb.eval()
    kwargs = {"_allow_non_fake_inputs": True} if mode != "real" else {}
    program = make_fx(emb, tracing_mode=mode, **kwargs)(X)
    assert "coldrow.lookup" in program.code
    for x in (X, Y):
        assert torch.equal(program(x), emb(x))


@pytest.mark.parametrize("trace", [torch.jit.trace, lambda f, x: make_fx(f)(x)])
def test_traces_that_would_leave_sparse_gradients_are_refused(trace):
    emb = bag(fused=False)
    with pytest.raises(NotImplementedError, match="a traced forward of these tables"):
        trace(emb, X)
    assert emb.weight.grad is None


def test_fake_tensors_have_shapes_and_touch_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    emb = bag()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = emb(mode.from_tensor(X))
    assert out.shape == (2, 4)
    assert emb.clock == 0
