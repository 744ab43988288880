"""The operators, torch.compile and torch.export: the same as eager, in one graph, compiled once."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch._dynamo.utils import counters
from torch.library import opcheck

import coldrow
import coldrow._operator
from coldrow.nn import Table, TableBatchedEmbeddingBags

pytestmark = [
    pytest.mark.skipif(
        not hasattr(torch.compiler, "is_compiling"), reason="needs torch.compiler.is_compiling"
    ),
    pytest.mark.filterwarnings("ignore"),  # torch's own, about its own
]

UPDATE = coldrow.RowUpdate(
    coldrow.Adam(lr=0.01), coldrow.EpochGated(coldrow.CumulativeLinear(half_life=5.0))
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Model(torch.nn.Module):
    """Two tables, three features, a dense layer."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [
            Table("a", 100, 16, features=["x", "y"]),
            Table("b", 50, 8, update=coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.02))),
        ]
        self.emb = TableBatchedEmbeddingBags(tables, UPDATE, **options)
        self.dense = torch.nn.Linear(40, 1)

    def forward(self, indices, offsets, weights=None, sizes=None):
        rows = self.emb(indices, offsets, weights, sizes)
        return self.dense(torch.relu(rows.view(-1, 40)))


def batch(generator, bags=15, size=2):
    n = bags * size
    return torch.randint(0, 50, (n,), generator=generator), torch.arange(0, n + 1, size)


def train(model, step_of, *, weighted=False, steps=12):
    """Train while epochs begin, lr and clock change; returns gradients of per_sample_weights."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    gradients = []
    for step in range(steps):
        if step == 4:
            model.emb.new_epoch()
        if step == 6:
            model.emb.lr = 0.05
        if step == 7:
            model.emb.param_groups[0]["lr"].fill_(0.03)
        if step == 8:
            model.emb.clock = 20
            model.emb.grad_scale = 2.0
        indices, offsets = batch(generator)
        weights = torch.rand(len(indices), generator=generator, requires_grad=True)
        out = step_of(indices, offsets, weights if weighted else None)
        optimizer.zero_grad()
        out.square().sum().backward()
        optimizer.step()
        gradients.append(weights.grad)
    return gradients if weighted else []


def tensors(emb):
    state = [s[n] for s in emb.state.values() for n in s]
    return [*(w.detach() for w in emb.weights.values()), *state]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"charge": "read"}, {"state_layout": "split"}, {"on_nonfinite": "propagate"}],
    ids=str,
)
def test_compiled_training_is_eager_training(options, weighted):
    eager, compiled = Model(**options), Model(**options)
    expected = train(eager, eager, weighted=weighted)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    gradients = train(compiled, step, weighted=weighted)
    for a, b in zip(tensors(eager.emb), tensors(compiled.emb), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(expected, gradients, strict=True):
        assert torch.equal(a, b)
    assert compiled.emb.clock == eager.emb.clock == 24
    # lr, clock, epoch and grad_scale changed, and nothing was compiled anew.
    assert counters["stats"]["unique_graphs"] == 1


def test_default_backend_and_sizes_of_batches():
    """Inductor: to rounding, for what it fuses around the tables."""
    eager, compiled = Model(), Model()
    step = torch.compile(compiled, fullgraph=True, dynamic=True)
    for bags in (15, 30, 60):
        generator = torch.Generator().manual_seed(bags)
        indices, offsets = batch(generator, bags)
        for model in (eager, step):
            model(indices, offsets).square().sum().backward()
    for a, b in zip(tensors(eager.emb), tensors(compiled.emb), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert compiled.emb.clock == 3


@pytest.mark.parametrize("sizes", [None, (3, 5, 7)])
@pytest.mark.parametrize("pooling", ["sum", "mean", "none"])
def test_shapes(pooling, sizes):
    def make():
        torch.manual_seed(0)
        tables = [Table("a", 100, 8, features=["x", "y"]), Table("b", 50, 8)]
        return TableBatchedEmbeddingBags(tables, coldrow.RowUpdate(), pooling=pooling)

    eager, compiled = make(), make()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    indices, offsets = batch(torch.Generator().manual_seed(0))
    for emb in (eager, step):
        out = emb(indices, offsets, None, sizes)
        out.square().sum().backward()
    assert out.shape == eager(indices, offsets, None, sizes).shape
    for a, b in zip(tensors(eager), tensors(compiled), strict=True):
        assert torch.equal(a, b)


def test_eval_and_no_grad_change_nothing():
    model = Model(charge="read")
    train(model, model)
    before = copy.deepcopy(model.state_dict())
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices, offsets = batch(torch.Generator().manual_seed(0))
    with torch.no_grad():
        frozen = step(indices, offsets)
    step.eval()
    assert torch.equal(step(indices, offsets), frozen)
    assert torch.equal(model(indices, offsets), frozen)
    for key, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[key]), key


def test_errors_come_through_and_write_nothing():
    model = Model(on_nonfinite="raise")
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices, offsets = batch(torch.Generator().manual_seed(0))
    before = [t.clone() for t in tensors(model.emb)]
    wrong = indices.clone()
    wrong[3] = 100
    with pytest.raises(IndexError, match="indices: got 100 at position 3 of table 'a'"):
        step(wrong, offsets)
    out = step(indices, offsets)
    with pytest.raises(ValueError, match="is not finite"):
        (out * float("nan")).sum().backward()
    assert all(map(torch.equal, before, tensors(model.emb)))
    assert model.emb.clock == 0


def test_nonfinite_rows_are_counted():
    model = Model()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    indices, offsets = batch(torch.Generator().manual_seed(0))
    (step(indices, offsets) * float("nan")).sum().backward()
    assert model.emb.nonfinite_rows > 0
    assert model.emb.clock == 1


def test_unfused_and_lists_of_outputs_break_the_graph_and_work():
    def make(**options):
        torch.manual_seed(0)
        tables = [Table("a", 60, 8), Table("b", 50, 4)]
        return TableBatchedEmbeddingBags(tables, coldrow.RowUpdate(), **options)

    indices, offsets = batch(torch.Generator().manual_seed(0), 16)
    for options in ({"fused": False}, {"pooling": "none"}):
        eager, compiled = make(**options), make(**options)
        for emb in (eager, torch.compile(compiled, backend="aot_eager")):
            out = emb(indices, offsets)
            sum(
                part.square().sum() for part in (out if isinstance(out, list) else [out])
            ).backward()
        for emb in (eager, compiled):
            if not emb.fused:
                emb.step()
        for a, b in zip(tensors(eager), tensors(compiled), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{"fused": False}, {"pooling": "none"}], ids=str)
def test_full_graph_of_those_is_refused(options):
    tables = [Table("a", 60, 8), Table("b", 50, 4)]
    emb = TableBatchedEmbeddingBags(tables, coldrow.RowUpdate(), **options)
    step = torch.compile(emb, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"compiler\.disable"):
        step(*batch(torch.Generator().manual_seed(0), 16))


@pytest.mark.parametrize("charge", ["touch", "read"])
def test_export_of_inference(charge):
    model = Model(charge=charge)
    train(model, model)
    model.emb.clock = 30
    model.eval()
    indices, offsets = batch(torch.Generator().manual_seed(0))
    auto = {0: torch.export.Dim.AUTO} if hasattr(torch.export.Dim, "AUTO") else None
    shapes = {"dynamic_shapes": {"indices": auto, "offsets": auto}} if auto else {}
    with torch.no_grad():
        exported = torch.export.export(model, (indices, offsets), **shapes)
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        bags = 45 if auto else 15
        indices, offsets = batch(torch.Generator().manual_seed(1), bags)
        assert torch.equal(loaded(indices, offsets), model(indices, offsets))
    if charge == "touch":  # the optimizer's state does not travel
        assert not any(c.dtype == torch.int32 for c in exported.constants.values())


def arguments():
    """Copies of what the operators are given, in their order: weights, state, lr, counters, spec."""
    model = Model(charge="read")
    train(model, model)
    tables = model.emb.table_batch
    at = tables.counters
    scalars = [at.lr, at.clock, at.epoch_start, at.nonfinite, at.grad_scale]
    arrays = [[t.detach().clone() for t in some] for some in (tables.weights, tables.state)]
    return *arrays, *[t.clone() for t in scalars], model.emb.spec


@pytest.mark.parametrize("train", [False, True])
def test_opcheck_lookup(train):
    *tensors, spec = arguments()
    indices, offsets = batch(torch.Generator().manual_seed(0))
    args = [torch.empty(0, requires_grad=train), *tensors, indices, offsets]
    sample_weights = torch.rand(len(indices), requires_grad=True)
    for extra in ((None, None), (sample_weights, None), (None, [3, 5, 7])):
        opcheck(torch.ops.coldrow.lookup.default, (*args, *extra, train, spec))


def test_opcheck_update_and_weight_gradients():
    weights, state, lr, clock, epoch_start, nonfinite, grad_scale, spec = arguments()
    indices, offsets = batch(torch.Generator().manual_seed(0))
    grad = torch.randn(5, 40)
    args = [weights, state, clock, nonfinite, lr, epoch_start, grad_scale, indices, offsets]
    opcheck(torch.ops.coldrow.update_.default, (*args, torch.rand(len(indices)), None, grad, spec))
    args = [weights, state, lr, clock, epoch_start, indices, offsets, None, grad, spec]
    opcheck(torch.ops.coldrow.weight_gradients.default, tuple(args))


def test_opcheck_and_compiled_apply():
    weight = torch.randn(10, 4)
    state = coldrow.init_state(UPDATE, 10, 4, weight)
    other = weight.clone(), {name: value.clone() for name, value in state.items()}
    spec = coldrow._operator.apply_spec(UPDATE, "raise", "name", 0, 0)
    arrays = [state[n].clone() for n in UPDATE.state_names]
    args = (weight.clone(), torch.randn(3, 4), torch.tensor([1, 2, 1]), arrays[0], arrays[1:])
    scalars = (torch.tensor(1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(0))
    opcheck(torch.ops.coldrow.apply_.default, (*args, *scalars, spec))
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("torch < 2.10 cannot trace a dataclass into a constant")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(grad, indices, step, lr):
        coldrow.apply_(UPDATE, weight, grad, indices, state, step=step, lr=lr, epoch_start=1)

    for step in range(1, 5):
        grad, indices, lr = torch.randn(3, 4), torch.randint(0, 10, (3,)), torch.tensor(0.1 * step)
        compiled(grad, indices, torch.tensor(step), lr)
        coldrow.apply_(UPDATE, other[0], grad, indices, other[1], step=step, lr=lr, epoch_start=1)
    assert torch.equal(weight, other[0])
    for name, value in state.items():
        assert torch.equal(value, other[1][name])
    assert counters["stats"]["unique_graphs"] == 1
    with pytest.raises(ValueError, match="step: got 4"):
        compiled(grad, indices, torch.tensor(4), lr)
