"""Bad batches, tables and settings of a module: one exception each, and not a byte changes."""

from __future__ import annotations

import warnings

import pytest

torch = pytest.importorskip("torch")
from refusals import (  # noqa: E402
    AN_UPDATE,
    CLOCKS,
    FLOATS,
    INF,
    INTS,
    LAST,
    LRS,
    NAN,
    UPDATE,
    batch,
    bits,
    forward,
    fused_or_not,
    make_module,
    refused,
)
from torch import nn  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402


def tensor(*values: int, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that nested tensors are a prototype
    RAGGED = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
# What replaces the argument named first.
BATCHES = {
    "indices: got list ... accepted: a torch tensor": (TypeError, [1, 4, 1, 0, 2]),
    "offsets: got NoneType ... accepted: a torch tensor": (TypeError, None),
    "indices: got a tensor of layout torch.sparse_coo ... accepted: a dense tensor": (
        TypeError,
        tensor(1, 4, 1, 0, 2).to_sparse(),
    ),
    "offsets: got a tensor of layout nested ... accepted: a dense tensor": (TypeError, RAGGED),
    "indices: got shape [1, 5] ... accepted: one dimension": (
        ValueError,
        tensor(1, 4, 1, 0, 2)[None],
    ),
    "offsets: got shape [2, 2] ... accepted: one dimension": (
        ValueError,
        tensor(0, 2, 3, 4).view(2, 2),
    ),
    f"indices: got dtype int16 ... {INTS}": (TypeError, tensor(1, 4, 1, 0, 2, dtype=torch.int16)),
    f"indices: got dtype float32 ... {INTS}": (TypeError, torch.rand(5)),
    "offsets: got dtype int32 ... accepted: the dtype of indices, int64": (
        TypeError,
        tensor(0, 2, 3, 4, 5, dtype=torch.int32),
    ),
    "indices: got 6 at position 1 of table 'user' ... accepted: 0 to 5": (
        IndexError,
        tensor(1, 6, 1, 0, 9),
    ),
    "indices: got 5 at position 4 of table 'item' ... accepted: 0 to 4": (
        IndexError,
        tensor(1, 4, 1, 0, 5),
    ),
    "indices: got -1 at position 3 of table 'item' ... accepted: 0 to 4": (
        IndexError,
        tensor(1, 4, 1, -1, 2),
    ),
    "offsets: got no elements ... accepted: number of bags": (ValueError, tensor()),
    "offsets: starts with 1 ... accepted: 0": (ValueError, tensor(1, 2, 3, 4, 5)),
    "offsets: starts with -1 ... accepted: 0": (ValueError, tensor(-1, 2, 3, 4, 5)),
    "offsets: falls to 2 at position 2 ... accepted: offsets that never decrease": (
        ValueError,
        tensor(0, 3, 2, 4, 5),
    ),
    "offsets: ends with 4 ... accepted: the number of indices, 5": (
        ValueError,
        tensor(0, 2, 3, 4, 4),
    ),
    "offsets: ends with 6 ... accepted: the number of indices, 5": (
        ValueError,
        tensor(0, 2, 3, 4, 6),
    ),
    "offsets: ends with 2147483653 ... accepted: the number of indices, 5": (
        ValueError,
        tensor(0, 2, 3, 4, 2**31 + 5),
    ),
    "offsets: ends with 4294967301 ... accepted: the number of indices, 5": (  # 5 in 32 bits
        ValueError,
        tensor(0, 2, 3, 4, 2**32 + 5),
    ),
    "offsets: falls to 3 at position 2 ... accepted: offsets that never decrease": (
        ValueError,
        tensor(0, 2**32 + 2, 3, 4, 5),
    ),
    "offsets: falls to -2147483646 at position 1 ... accepted: offsets that never decrease": (
        ValueError,
        tensor(0, 2 - 2**31, 3, 4, 5),
    ),
    "offsets: got int64[4] ... accepted: a length of 2 features * batch + 1": (
        ValueError,
        tensor(0, 2, 3, 5),
    ),
    "batch_sizes: got 2 sizes that add up to 3 ... accepted: one per feature (2) ... = 4": (
        ValueError,
        [1, 2],
    ),
    "batch_sizes: got 1 sizes ... accepted: one per feature (2)": (ValueError, [4]),
    "batch_sizes: got 3 sizes ... accepted: one per feature (2)": (ValueError, [1, 2, 1]),
    "batch_sizes: got -1 ... accepted: an integer from 0": (ValueError, [5, -1]),
    "batch_sizes: got 1.5 ... accepted: an integer from 0": (TypeError, [1.5, 2.5]),
    "batch_sizes: got 2 sizes that add up to 4294967294 ... = 4": (ValueError, [LAST, LAST]),
    "batch_sizes: got 4 ... accepted: ": (TypeError, 4),
    "batch_sizes: got nested_tensor ... accepted: ": (TypeError, RAGGED),
}
WEIGHTS = {
    "per_sample_weights: got float32[4] ... accepted: shape [5]": (ValueError, torch.ones(4)),
    "per_sample_weights: got float32[5, 1] ... accepted: shape [5]": (ValueError, torch.ones(5, 1)),
    "per_sample_weights: got ... dtype=torch.int32 ... accepted: a float tensor": (
        TypeError,
        torch.ones(5, dtype=torch.int32),
    ),
    "per_sample_weights: got [1.0, ... accepted: a float tensor": (TypeError, [1.0] * 5),
    "per_sample_weights: got a tensor of layout nested ... accepted: a dense tensor": (
        TypeError,
        RAGGED,
    ),
}
MODES = {
    "fused": {},
    "unfused": {"fused": False},
    "unpooled": {"pooling": "none"},
    "read": {"charge": "read"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("says", BATCHES)
@pytest.mark.parametrize("training", [True, False])
def test_batch_that_is_not_accepted(mode, says, training):
    kind, value = BATCHES[says]
    emb = make_module(**MODES[mode]).train(training)
    given = batch(**{says.partition(":")[0]: value})
    with refused(kind, says, unchanged=[emb, *given.values()]):
        emb(**given)
    forward(emb)  # and the module goes on


@pytest.mark.parametrize("says", WEIGHTS)
@pytest.mark.parametrize("fused", [True, False])
def test_per_sample_weights_that_are_not_accepted(says, fused):
    kind, value = WEIGHTS[says]
    emb = make_module(fused=fused)
    with refused(kind, says, unchanged=[emb, value]):
        forward(emb, per_sample_weights=value)


@pytest.mark.parametrize("pooling", ["mean", "none"])
def test_per_sample_weights_go_with_sum_only(pooling):
    emb = make_module(pooling=pooling)
    says = f"per_sample_weights: given with pooling='{pooling}' ... accepted: with pooling='sum'"
    with refused(ValueError, says, unchanged=[emb]):
        forward(emb, per_sample_weights=torch.ones(5))


def two(**options) -> list[Table]:
    """Two tables that differ only where ``options`` do not say."""
    return [Table(**{"name": n, "num_rows": 2, "dim": 2, **options}) for n in "ab"]


MODULES = {
    "tables: got [] ... accepted: a non-empty list of Table": (TypeError, []),
    "tables: got ['user'] ... accepted: a non-empty list of Table": (TypeError, ["user"]),
    "tables: table 'a' is given twice ... accepted: once": (ValueError, two(name="a")),
    "tables: feature 'f' is given twice ... accepted: once": (ValueError, two(features=["f"])),
    f"update: got 'adam' ... {AN_UPDATE}": (TypeError, "adam"),
    "pooling: got 'max' ... accepted: 'sum', 'mean', 'none'": (ValueError, "max"),
    "charge: got 'write' ... accepted: 'touch', 'read'": (ValueError, "write"),
    "output_dtype: got torch.float64 ... accepted: torch.float32": (ValueError, torch.float64),
    "on_nonfinite: got 'ignore' ... accepted: 'skip', 'raise', 'propagate'": (ValueError, "ignore"),
    "validate: got 'never' ... accepted: 'deferred', 'sync'": (ValueError, "never"),
    "state_layout: got 'columns' ... accepted: 'record', 'split'": (ValueError, "columns"),
    "device: got 'meta' ... accepted: 'cpu'": (ValueError, torch.device("meta")),
}


@pytest.mark.parametrize("says", MODULES)
def test_module_that_is_not_accepted(says):
    kind, value = MODULES[says]
    with refused(kind, says):
        TableBatchedEmbeddingBags(
            **{"tables": two(), "update": UPDATE, says.partition(":")[0]: value}
        )


TABLES = {
    "name: got '' ... accepted: a non-empty string without dots": (ValueError, ""),
    "name: got 'a.b' ... accepted: a non-empty string without dots": (ValueError, "a.b"),
    "name: got 3 ... accepted: a non-empty string without dots": (ValueError, 3),
    "num_rows: got 0 ... accepted: an integer from 1": (ValueError, 0),
    "num_rows: got 2.5 ... accepted: an integer from 1": (TypeError, 2.5),
    "dim: got 0 ... accepted: an integer from 1": (ValueError, 0),
    "dtype: got torch.float64 ... accepted: torch.float32": (ValueError, torch.float64),
    "dtype: got torch.int8 ... accepted: torch.float32": (ValueError, torch.int8),
    "features: got 'u' ... accepted: a list of names": (TypeError, "u"),
    "init: got 0.5 ... accepted: a callable": (TypeError, 0.5),
    f"update: got 1 ... {AN_UPDATE}": (TypeError, 1),
}


@pytest.mark.parametrize("says", TABLES)
def test_table_that_is_not_accepted(says):
    kind, value = TABLES[says]
    with refused(kind, says):
        Table(**{"name": "user", "num_rows": 6, "dim": 4, says.partition(":")[0]: value})


@fused_or_not
@pytest.mark.parametrize("says", CLOCKS | LRS)
def test_clock_and_lr_that_are_not_accepted(fused, says):
    kind, value = (CLOCKS | LRS)[says]
    emb = make_module(fused=fused)
    with refused(kind, says, unchanged=[emb]):
        setattr(emb, says.partition(":")[0], value)


@fused_or_not
@pytest.mark.parametrize("says", LRS)
def test_lr_of_a_param_group_that_is_not_accepted(fused, says):
    kind, value = LRS[says]
    emb = make_module(fused=fused)
    before = bits(emb)
    with refused(kind, says):
        emb.param_groups[0]["lr"] = value
    with refused(kind, says):
        emb.param_groups[0].update(lr=value)
    assert bits(emb) == before
    assert emb.lr == emb.update.optimizer.lr


@fused_or_not
def test_lr_tensor_that_went_bad_is_found_before_anything_is_written(fused):
    emb = make_module(fused=fused)
    loss = forward(emb).sum()
    if not fused:
        loss.backward()
    emb.param_groups[0]["lr"].fill_(NAN)
    with refused(ValueError, "lr ... accepted: a ", unchanged=[emb]):
        loss.backward() if fused else emb.step()


def test_clock_at_its_end():
    says = "clock: is at 2147483647 ... accepted: steps up to 2**31 - 1"
    emb = make_module()
    emb.clock = LAST - 1
    forward(emb).sum().backward()  # the last step
    assert emb.clock == emb.state["user"]["prev_iter"].max() == LAST
    with refused(ValueError, says, unchanged=[emb]):
        forward(emb).sum().backward()
    with refused(ValueError, says, unchanged=[emb]):
        emb.new_epoch()
    emb = make_module(fused=False)
    forward(emb).sum().backward()
    emb.clock = LAST
    with refused(ValueError, says, unchanged=[emb]):
        emb.step()


@pytest.mark.parametrize("charge", ["touch", "read"])
def test_clock_at_its_end_still_serves_evaluation(charge):
    emb = make_module(charge=charge).eval()
    emb.clock = LAST
    rows = emb.read("user", [1, 4])
    torch.testing.assert_close(forward(emb)[:, :4], torch.stack([rows.sum(0), rows[0]]))


ROW_LISTS = {
    "rows: got 6 ... accepted: 0 to 5": (IndexError, [6]),
    "rows: got -1 ... accepted: 0 to 5": (IndexError, [0, -1]),
    "rows: got torch.float32 of shape [1] ... accepted: int32 or int64": (TypeError, [1.0]),
    "rows: got torch.int64 of shape [1, 1] ... accepted: int32 or int64": (TypeError, [[1]]),
    "rows: got torch.bool of shape [2] ... accepted: int32 or int64": (TypeError, [True, False]),
    "rows: got 'all' ... accepted: int32 or int64": (TypeError, "all"),
    "rows: got a tensor of layout torch.sparse_coo ... accepted: a dense tensor": (
        TypeError,
        torch.tensor([1]).to_sparse(),
    ),
}


@pytest.mark.parametrize("charge", ["touch", "read"])
@pytest.mark.parametrize("what", ["read", "evict"])
@pytest.mark.parametrize("says", ROW_LISTS)
def test_rows_that_are_not_there(charge, what, says):
    kind, rows = ROW_LISTS[says]
    emb = make_module(charge=charge)
    with refused(kind, says, unchanged=[emb]):
        getattr(emb, what)("user", rows)


def test_table_that_is_not_there():
    emb = make_module()
    says = "table: got 'film' ... accepted: user, item"
    for call in (emb.read, emb.evict, emb.cold_rows):
        with refused(KeyError, says, unchanged=[emb]):
            call("film", 1)


def test_cold_rows_of_a_gap_that_is_not_one():
    emb = make_module()
    with refused(ValueError, "min_gap: got -1 ... accepted: an integer from 0", unchanged=[emb]):
        emb.cold_rows("user", -1)


def test_conversion_to_what_tables_cannot_be():
    emb = make_module()
    with refused(TypeError, f"dtype: got torch.float64 ... {FLOATS}", unchanged=[emb]):
        emb.double()
    with refused(ValueError, "device: got 'meta' ... accepted: 'cpu'", unchanged=[emb]):
        emb.to("meta")
    assert emb.weights["user"].dtype == torch.float32


def test_step_of_a_fused_module():
    emb = make_module()
    with refused(RuntimeError, "step() ... backward ... fused=False", unchanged=[emb]):
        emb.step()


def test_second_training_forward_while_one_is_outstanding():
    emb = make_module()
    out = forward(emb)
    says = "a training forward ... is waiting for its backward ... fused=False"
    with refused(RuntimeError, says, unchanged=[emb, out]):
        forward(emb)
    out.sum().backward()
    assert emb.clock == 2


def test_repeated_backward():
    emb = make_module()
    loss = forward(emb).sum()
    loss.backward(retain_graph=True)
    says = "this forward has had its backward ... fused=False"
    with refused(RuntimeError, says, unchanged=[emb]):
        loss.backward()


@fused_or_not
def test_double_backward(fused):
    emb = make_module(fused=fused)
    weights = torch.ones(5, requires_grad=True)
    out = forward(emb, per_sample_weights=weights)
    (grad,) = torch.autograd.grad(out.square().sum(), weights, create_graph=True)
    says = "trying to differentiate twice ... once_differentiable"
    with refused(RuntimeError, says, unchanged=[emb]):
        grad.sum().backward()


CHANGES = {
    "evict": lambda emb: emb.evict("user", [0]),
    "load": lambda emb: emb.load_state_dict(emb.state_dict()),
    "convert": lambda emb: emb.half(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_backward_after_the_tables_changed(how):
    emb = make_module()
    out = forward(emb)
    CHANGES[how](emb)
    says = "the tables were ... between forward and backward"
    with refused(RuntimeError, says, unchanged=[emb]):
        out.sum().backward()


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, "2"])
def test_grad_scale_that_is_not_accepted(value):
    emb = make_module()
    kind = TypeError if isinstance(value, str) else ValueError
    says = f"grad_scale: got {value!r} ... accepted: a number > 0"
    with refused(kind, says, unchanged=[emb]):
        emb.grad_scale = value
    assert emb.grad_scale == 1.0


@fused_or_not
@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_nonfinite_gradient_of_the_last_table_changes_none(fused, value):
    emb = make_module(fused=fused, on_nonfinite="raise")
    out = forward(emb)
    grad = torch.ones_like(out)
    grad[1, 4:] = value  # bag 1 of item: row 2
    if not fused:
        out.backward(grad)
    says = "grad: the update of row 2 ... is not finite (1 such rows) ... accepted: finite"
    with refused(ValueError, says, unchanged=[emb]):
        out.backward(grad) if fused else emb.step()


def test_gradient_that_is_the_table_itself():
    emb = TableBatchedEmbeddingBags([Table("user", 2, 4)], UPDATE)
    out = emb(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))
    with refused(ValueError, "weight and grad: share memory ... accepted", unchanged=[emb]):
        out.backward(emb.weights["user"].detach())


def test_dense_gradient_in_an_unfused_module():
    emb = make_module(fused=False)
    emb.weights["item"].grad = torch.ones(5, 2)
    says = "weights.item.grad: got layout torch.strided ... accepted: sparse gradients"
    with refused(TypeError, says, unchanged=[emb]):
        emb.step()


FROM_TORCH = {
    "mode: got 'max' ... accepted: 'sum', 'mean', 'none'": nn.EmbeddingBag(6, 4, mode="max"),
    "max_norm: got 1.0 ... accepted: none": nn.EmbeddingBag(6, 4, max_norm=1.0),
    "padding_idx: got 2 ... accepted: none": nn.EmbeddingBag(6, 4, padding_idx=2),
    "padding_idx: got 0 ... accepted: none": nn.EmbeddingBag(6, 4, padding_idx=0),
    "scale_grad_by_freq: got True ... accepted: none": nn.Embedding(6, 4, scale_grad_by_freq=True),
}


@pytest.mark.parametrize("says", FROM_TORCH)
def test_from_torch_of_an_option_without_counterpart(says):
    with refused(ValueError, says):
        TableBatchedEmbeddingBags.from_torch(FROM_TORCH[says], UPDATE)


def test_from_torch_of_another_layer():
    with refused(TypeError, "module: got Linear ... accepted: an nn.EmbeddingBag"):
        TableBatchedEmbeddingBags.from_torch(nn.Linear(2, 2), UPDATE)
