"""Rubbish into every public function: each call works, or raises one exception that names an argument and
leaves every array as it was.

A call that is right is drawn, then one to three of its arguments are replaced by wrong objects, dtypes,
shapes, strides, read-only or overlapping memory. COLDROW_FUZZ_EXAMPLES sets how many calls are made of
each function (make fuzz).
"""

import array
import os
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coldrow
from coldrow.nn import (
    Embedding,
    EmbeddingBag,
    Table,
    TableBatchedEmbeddingBags,
    clip_grad_norm_,
)
from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer

# The same calls each time, so that the suite does not depend on luck; make fuzz draws others.
FUZZING = "COLDROW_FUZZ_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("COLDROW_FUZZ_EXAMPLES", 150))
E, D, N = 7, 5, 4  # rows, columns, indices of a call that is right

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=not FUZZING,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of NumPy and torch, about what the rubbish is
]

# -------------------------------------------------------------------------------------------- rubbish

NUMPY_DTYPES = ["?", "i1", "u1", "i2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8"]
NUMPY_DTYPES += [">f4", ">i8", "O", "U3", "M8[s]"]
TORCH_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e5m2,
]
SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, N, D, E, 9]), max_size=3).map(tuple),
    st.sampled_from([(E,), (N,), (D,), (E, D), (N, D), (E, 1), (2, E, D), (1,) * 6]),
)
# Sizes between these could be allocated, and would be.
INTEGERS = [-(2**63) - 1, -(2**31), -1, 0, 1, 2, 3, N, D, E, 2**62, 2**63, 2**64, 10**30]
SCALARS = [
    None,
    True,
    *INTEGERS,
    float("nan"),
    float("inf"),
    -float("inf"),
    -0.0,
    -1e-45,
    1e-45,
    0.5,
    1e39,
    1e308,
    "",
    "raise",
    "mean",
    "\0",
    b"bytes",
    1j,
    object,
    len,
    Ellipsis,
    np.float64("nan"),
    np.int64(-1),
    np.bool_(True),
    np.datetime64("2020"),
    torch.float32,
    torch.device("meta"),
]


class Hostile:
    """Answers every question with an error of its own, or with itself."""

    def __init__(self, raises):
        self._raises = raises

    def __getattr__(self, name):
        if name.startswith("_") or self._raises:
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __len__(self):
        return -1

    def __repr__(self):
        return "Hostile()"


@st.composite
def numpy_arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(NUMPY_DTYPES)))
    shape = draw(SHAPES)
    a = np.zeros(shape, dtype)
    if dtype.kind in "biuf" and a.size:
        a += draw(st.sampled_from([0, 1])) if dtype.kind != "b" else False
    change = draw(
        st.sampled_from(
            ["no", "no", "transpose", "reverse", "stride", "broadcast", "read-only", "misaligned"]
        )
    )
    if change == "transpose":
        a = a.T
    elif change == "reverse" and a.ndim:
        a = a[::-1]
    elif change == "stride" and a.ndim:
        a = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]
    elif change == "broadcast":
        a = np.broadcast_to(np.zeros((), dtype), shape)
    elif change == "read-only":
        a.flags.writeable = False
    elif change == "misaligned" and dtype.kind in "iuf":
        a = np.zeros(a.nbytes + 1, np.uint8)[1:].view(dtype).reshape(shape)
    return a


@st.composite
def torch_tensors(draw):
    dtype = draw(st.sampled_from(TORCH_DTYPES))
    shape = draw(SHAPES)
    t = torch.zeros(shape, dtype=dtype)
    change = draw(
        st.sampled_from(
            [
                "no",
                "no",
                "transpose",
                "stride",
                "expand",
                "grad",
                "meta",
                "sparse",
                "negative",
                "quantized",
                "nested",
                "inference",
            ]
        )
    )
    if change == "transpose" and t.dim() >= 2:
        t = t.transpose(0, 1)
    elif change == "stride" and t.dim():
        t = torch.zeros((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]
    elif change == "expand":
        t = torch.zeros((), dtype=dtype).expand(shape)
    elif change == "grad" and (dtype.is_floating_point or dtype.is_complex):
        t.requires_grad_()
    elif change == "meta":
        t = t.to("meta")
    elif change == "sparse" and t.dim() and dtype != torch.float8_e5m2:
        t = t.to_sparse()
    elif change == "negative" and dtype == torch.complex64:
        t = t.conj()
        t = t.imag if draw(st.booleans()) else t
    elif change == "quantized" and dtype == torch.float32:
        t = torch.quantize_per_tensor(t, 1.0, 0, torch.qint8)
    elif change == "nested" and dtype == torch.float32:
        t = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    elif change == "inference":
        with torch.inference_mode():
            t = torch.zeros(shape, dtype=dtype)
    return t


CONTAINERS = st.sampled_from(
    [
        lambda: [],
        lambda: [1, 2],
        lambda: [[0.0] * D] * N,
        lambda: ["a", None],
        lambda: {},
        lambda: {"prev_iter": None},
        lambda: {0: 0},
        lambda: (),
        lambda: iter([1, 2]),
        lambda: bytearray(4 * E),
        lambda: memoryview(bytes(4 * E)),
        lambda: array.array("f", [0.0] * E),
        lambda: Hostile(True),
        lambda: Hostile(False),
        lambda: np.zeros(3, dtype=[("a", "f4"), ("b", "i4")]),
        lambda: coldrow.RowUpdate(),
        lambda: coldrow.Constant(0.5),
        lambda: torch.nn.Embedding(E, D),
        lambda: torch.nn.Parameter(torch.zeros(E, D)),
    ]
).map(lambda make: make())

RUBBISH = st.one_of(st.sampled_from(SCALARS), numpy_arrays(), torch_tensors(), CONTAINERS)


def memory_of(value):
    """The bytes of everything in an argument that has some."""
    if isinstance(value, np.ndarray):
        return [] if value.dtype.hasobject else [value.tobytes()]
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_nested:
            return []
        storage = value.untyped_storage()
        return [bytes(storage)] if storage.nbytes() else []
    if isinstance(value, dict):
        return [m for v in value.values() for m in memory_of(v)]
    if isinstance(value, (list, tuple)):
        return [m for v in value for m in memory_of(v)]
    if isinstance(value, torch.nn.Module):
        return memory_of(list(value.state_dict().values()))
    if isinstance(value, (bytearray, memoryview, array.array)):
        return [bytes(value)]
    return []


def spoil(data, arguments):
    """Replace one to three arguments (of a dict or within ``state``) by rubbish."""
    names = list(arguments)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        value = arguments[name]
        how = data.draw(st.sampled_from(["rubbish", "rubbish", "alias", "inside"]))
        if how == "alias":
            other = arguments[data.draw(st.sampled_from(names))]
            if isinstance(other, dict) and other:
                other = other[data.draw(st.sampled_from(list(other)))]
            arguments[name] = other
        elif how == "inside" and isinstance(value, dict):
            value = dict(value)
            if data.draw(st.booleans()) and value:
                value[data.draw(st.sampled_from(list(value)))] = data.draw(RUBBISH)
            elif data.draw(st.booleans()):
                value.popitem()
            else:
                value["more"] = data.draw(RUBBISH)
            arguments[name] = value
        elif how == "inside" and isinstance(value, (list, tuple)) and value:
            value = list(value)
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(RUBBISH)
            arguments[name] = value
        else:
            arguments[name] = data.draw(RUBBISH)


def expect_contract(call, arguments, names=(), watched=()):
    """Call; if it raises, the message must name an argument and no memory may have changed."""
    everything = [*arguments.values(), *watched]
    before = memory_of(everything)
    message = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**arguments)
    except (TypeError, ValueError, IndexError, KeyError) as error:
        message = f"{type(error).__name__}: {error}"
    if message is None:
        return
    known = {*arguments, *names}
    for value in arguments.values():
        if isinstance(value, dict):
            known |= {k for k in value if isinstance(k, str)}
    assert any(re.search(rf"\b{re.escape(n)}\b", message) for n in known), (
        f"names no argument of {sorted(known)}: {message}"
    )
    assert memory_of(everything) == before, f"wrote, then raised {message}"


# --------------------------------------------------------------------------------- functions on arrays

OPTIMIZERS = st.sampled_from(
    [
        coldrow.SGD(),
        coldrow.RowwiseRMSprop(),
        coldrow.Adagrad(),
        coldrow.Adam(bias_correction="row"),
        coldrow.PartialRowwiseAdam(),
    ]
)
STATES = ["momentum1", "momentum2", "touches", "prev_iter"]


@st.composite
def apply_arguments(draw):
    update = coldrow.RowUpdate(draw(OPTIMIZERS), coldrow.LinearClipped(1e-3))
    library = draw(st.sampled_from(["numpy", "torch"]))
    make = np.zeros if library == "numpy" else torch.zeros
    dtypes = np if library == "numpy" else torch
    weight = make((E, D), dtype=dtypes.float32)
    grad = make((N, D), dtype=dtypes.float32)
    grad[...] = 1.0
    indices = make((N,), dtype=dtypes.int64)
    indices[1:] = 3
    return {
        "update": update,
        "weight": weight,
        "grad": grad,
        "indices": indices,
        "state": coldrow.init_state(update, E, D, like=weight),
        "step": 3,
        "lr": 0.1,
        "epoch_start": 2,
        "on_nonfinite": draw(st.sampled_from(["raise", "skip", "propagate"])),
        "table": 1,
        "row_offset": 0,
        "col_offset": 0,
    }


@fuzz
@given(arguments=apply_arguments(), data=st.data())
def test_apply(arguments, data):
    spoil(data, arguments)
    expect_contract(coldrow.apply_, arguments, STATES)


@fuzz
@given(arguments=apply_arguments(), data=st.data())
def test_rowwise_rmsprop_ar(arguments, data):
    for name in ("update", "epoch_start"):
        del arguments[name]
    weight, state = arguments["weight"], arguments.pop("state")
    state = coldrow.init_state(coldrow.RowUpdate(), E, D, like=weight)
    arguments |= {**state, "eps": 1e-8, "ema_beta": 0.9, "ar_alpha": 0.5, "min_shrinkage": 0.1}
    arguments["rounding"] = coldrow.Stochastic(1)
    spoil(data, arguments)
    expect_contract(coldrow.rowwise_rmsprop_ar_, arguments)


@fuzz
@given(arguments=apply_arguments(), data=st.data())
def test_read(arguments, data):
    kept = ["update", "weight", "indices", "state", "step", "lr", "epoch_start"]
    arguments = {"out": arguments["grad"], **{k: arguments[k] for k in kept}}
    spoil(data, arguments)
    expect_contract(coldrow.read_, arguments, STATES)


@fuzz
@given(data=st.data())
def test_init_state(data):
    arguments = {"update": coldrow.RowUpdate(), "num_rows": E, "dim": D, "like": np.zeros(1)}
    spoil(data, arguments)
    expect_contract(coldrow.init_state, arguments)


# -------------------------------------------------------------------------------------------- policies

POLICIES = {
    coldrow.SGD: {"lr": 0.1},
    coldrow.RowwiseRMSprop: {"lr": 0.1, "eps": 1e-8, "ema_beta": 0.9},
    coldrow.RowwiseAdagrad: {"lr": 0.1, "eps": 1e-8},
    coldrow.Adagrad: {"lr": 0.1, "eps": 1e-8},
    coldrow.Adam: {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "bias_correction": "row"},
    coldrow.PartialRowwiseAdam: {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8},
    coldrow.LinearClipped: {"alpha": 0.1, "min_shrinkage": 0.1},
    coldrow.CumulativeLinear: {"alpha": 0.1},
    coldrow.Exponential: {"weight_decay": 0.1},
    coldrow.Constant: {"weight_decay": 0.1},
    coldrow.EpochGated: {"decay": coldrow.Constant(0.1)},
    coldrow.Stochastic: {"seed": 1},
    coldrow.RowUpdate: {
        "optimizer": coldrow.SGD(),
        "decay": coldrow.NoDecay(),
        "rounding": coldrow.Nearest(),
        "decay_state": False,
    },
}


@fuzz
@given(data=st.data())
def test_policies(data):
    policy = data.draw(st.sampled_from(list(POLICIES)))
    arguments = dict(POLICIES[policy])
    if policy in (coldrow.CumulativeLinear, coldrow.Exponential) and data.draw(st.booleans()):
        arguments = {"half_life": 3.0}
    spoil(data, arguments)
    expect_contract(policy, arguments, ["half_life"])


# --------------------------------------------------------------------------------------------- modules


@fuzz
@given(data=st.data())
def test_table(data):
    arguments = {
        "name": "a",
        "num_rows": E,
        "dim": D,
        "dtype": torch.float16,
        "features": ["x"],
        "init": None,
        "update": None,
    }
    spoil(data, arguments)
    expect_contract(Table, arguments)


@fuzz
@given(data=st.data())
def test_module_constructor(data):
    arguments = {
        "tables": [Table("a", E, D), Table("b", E, D)],
        "update": coldrow.RowUpdate(),
        "pooling": "sum",
        "charge": "read",
        "device": "cpu",
        "output_dtype": torch.float32,
        "fused": True,
        "on_nonfinite": "skip",
        "validate": "sync",
        "state_layout": "record",
    }
    spoil(data, arguments)
    expect_contract(TableBatchedEmbeddingBags, arguments)


def module(data):
    emb = TableBatchedEmbeddingBags(
        [Table("a", E, D), Table("b", E + 1, D, features=["b", "c"], dtype=torch.bfloat16)],
        coldrow.RowUpdate(data.draw(OPTIMIZERS), coldrow.LinearClipped(0.1)),
        pooling=data.draw(st.sampled_from(["sum", "mean", "none"])),
        charge=data.draw(st.sampled_from(["touch", "read"])),
        fused=data.draw(st.booleans()),
    )
    emb.clock = 5
    return emb


@fuzz
@given(data=st.data())
def test_forward_and_backward(data):
    emb = module(data)
    arguments = {
        "indices": torch.tensor([0, 1, 2, 3, 0, 6]),
        "offsets": torch.tensor([0, 2, 3, 4, 4, 5, 6]),
        "per_sample_weights": torch.ones(6) if emb.pooling == "sum" else None,
        "batch_sizes": data.draw(st.sampled_from([None, [2, 2, 2], [1, 0, 5]])),
    }
    spoil(data, arguments)

    def call(**arguments):
        out = emb(**arguments)
        if out.requires_grad:
            out.sum().backward()
            if not emb.fused:
                emb.step()

    expect_contract(call, arguments, watched=[emb])


@fuzz
@given(data=st.data())
def test_rows_of_a_module(data):
    emb = module(data)
    calls = {
        emb.read: {"name": "a", "rows": torch.tensor([1, 2])},
        emb.evict: {"name": "b", "rows": [0, 3]},
        emb.cold_rows: {"name": "b", "min_gap": 3},
    }
    call = data.draw(st.sampled_from(list(calls)))
    spoil(data, calls[call])
    expect_contract(call, calls[call], ["table"], watched=[emb])


@fuzz
@given(data=st.data())
def test_attributes_of_a_module(data):
    emb = module(data)
    name = data.draw(st.sampled_from(["clock", "lr", "grad_scale", "nonfinite_rows"]))
    arguments = {name: data.draw(RUBBISH)}
    expect_contract(lambda **a: setattr(emb, *next(iter(a.items()))), arguments, watched=[emb])
    assert np.isfinite([emb.clock, emb.lr, emb.grad_scale, emb.nonfinite_rows]).all()


@fuzz
@given(data=st.data())
def test_one_table_modules(data):
    kind = data.draw(st.sampled_from([Embedding, EmbeddingBag]))
    arguments = {"num_embeddings": E, "embedding_dim": D, "update": None, "padding_idx": 0}
    if kind is EmbeddingBag:
        arguments |= {"mode": "sum"}
    if data.draw(st.booleans()):
        spoil(data, arguments)
        expect_contract(kind, arguments)
        return
    emb = kind(**arguments)
    inputs = {"input": torch.tensor([[0, 1], [2, 3]])}
    if kind is EmbeddingBag and data.draw(st.booleans()):
        inputs = {"input": torch.tensor([0, 1, 2, 3]), "offsets": torch.tensor([0, 2])}
    spoil(data, inputs)
    expect_contract(
        lambda **a: emb(**a).sum().backward(), inputs, ["indices", "offsets"], watched=[emb]
    )


# ------------------------------------------------------------------------------------------ optimizers


@fuzz
@given(data=st.data())
def test_optimizers(data):
    layer = torch.nn.Embedding(E, D, sparse=True)
    kind = data.draw(st.sampled_from([SparseOptimizer, RowwiseRMSpropAR]))
    arguments = {"params": [layer.weight]}
    arguments |= {"update": coldrow.RowUpdate()} if kind is SparseOptimizer else {"lr": 0.1}
    spoil(data, arguments)
    expect_contract(kind, arguments, ["param", "parameter", "parameters"], watched=[layer])


@fuzz
@given(data=st.data())
def test_gradient_of_an_optimizer(data):
    layer = torch.nn.Embedding(E, D, sparse=True)
    opt = SparseOptimizer(layer.parameters(), coldrow.RowUpdate(data.draw(OPTIMIZERS)))
    arguments = {
        "indices": torch.tensor([[0, 3, 3]]),
        "values": torch.ones(3, D),
        "size": (E, D),
    }
    spoil(data, arguments)
    try:
        grad = torch.sparse_coo_tensor(**arguments, check_invariants=False)
        layer.weight.grad = grad
    except Exception:  # torch takes no such gradient
        return
    expect_contract(lambda: opt.step(), {}, ["grad", "gradient", "indices"], watched=[layer])


@fuzz
@given(data=st.data())
def test_clip_grad_norm(data):
    layer = torch.nn.Embedding(E, D, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    arguments = {"parameters": [layer.weight], "max_norm": 1.0, "norm_type": 2.0}
    spoil(data, arguments)
    expect_contract(clip_grad_norm_, arguments)
