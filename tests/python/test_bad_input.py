"""Bad input raises one exception that says what was wrong, what was given and what is accepted, and
not a byte of any array changes.

The tables of cases are keyed by what the message must say: " ... " stands for anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import pathlib
import resource
import shutil
import types
import warnings

import numpy as np
import pytest

import coldrow
from coldrow import _engines

torch = pytest.importorskip("torch")

import errors_page  # noqa: E402
from torch import nn  # noqa: E402

from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402
from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer  # noqa: E402

NAN, INF = float("nan"), float("inf")
LAST = 2**31 - 1
FLOATS = "accepted: float32, float16, bfloat16"
INTS = "accepted: int32, int64"
NUMBER = "accepted: a number >= 0 and finite"
FRACTION = "accepted: a number >= 0 and <= 1"
STEPS = "accepted: an integer from 1 to 2147483647"
AN_UPDATE = "accepted: a coldrow.RowUpdate"
ARRAY = "accepted: a torch tensor, or a NumPy, CuPy or other DLPack array"

UPDATE = coldrow.RowUpdate(
    coldrow.RowwiseRMSprop(lr=0.1), coldrow.LinearClipped(alpha=0.1), coldrow.Stochastic(seed=3)
)


def bits(thing) -> bytes:
    """Every byte that training ``thing`` could change."""
    if isinstance(thing, TableBatchedEmbeddingBags):
        tensors = [p for _, p in thing.weights.items()]
        tensors += [view for views in thing.state.values() for view in views.values()]
        counters = [thing.clock, thing.epoch_start, thing.lr, thing.nonfinite_rows]
        return b"".join(map(bits, tensors)) + repr(counters).encode()
    if isinstance(thing, SparseOptimizer):
        params = [p for group in thing.param_groups for p in group["params"]]
        states = [s for p in params for s in thing.state[p].values()]
        return b"".join(map(bits, params + states)) + repr([thing.clock]).encode()
    if isinstance(thing, np.ndarray):
        return thing.tobytes()
    if isinstance(thing, torch.Tensor) and (thing.is_sparse or thing.is_nested):
        return bits(thing._values() if thing.is_sparse else thing.values())
    if isinstance(thing, torch.Tensor):
        dense = thing.detach().clone(memory_format=torch.contiguous_format)
        return dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    return repr(thing).encode()


@contextlib.contextmanager
def refused(kind, says: str, unchanged=()):
    """The body raises ``kind``, the message has the parts of ``says`` in order, nothing changes."""
    before = [bits(thing) for thing in unchanged]
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value.args[0])
    errors_page.record(type(caught.value).__name__, message, sum(map(len, before)))
    first, *rest = says.split(" ... ")
    assert message.startswith(first)
    at = len(first)
    for part in rest:
        at = message.find(part, at)
        assert at >= 0, f"{part!r} is not where it should be in {message!r}"
    assert [bits(thing) for thing in unchanged] == before


# -------------------------------------------------------------------------------------- functional

ROWS, DIM = 6, 4


def make_arrays(library: str = "numpy") -> dict:
    """Arguments that are accepted, for step 7: three gradients for two rows."""
    rng = np.random.default_rng(0)
    made = {
        "weight": rng.standard_normal((ROWS, DIM), dtype=np.float32),
        "grad": rng.standard_normal((3, DIM), dtype=np.float32),
        "indices": np.array([1, 4, 1]),
        "momentum1": rng.random(ROWS, dtype=np.float32),
        "prev_iter": np.array([0, 3, 2, 0, 5, 1], np.int32),
    }
    return made if library == "numpy" else {k: torch.from_numpy(v) for k, v in made.items()}


def call_rowwise(arrays: dict, **options) -> None:
    coldrow.rowwise_rmsprop_ar_(**arrays, **{"step": 7, "lr": 0.1, **options})


def call_apply(arrays: dict, update=UPDATE, **options) -> None:
    rest = dict(arrays)
    state = {name: rest.pop(name) for name in ("momentum1", "prev_iter")}
    coldrow.apply_(update, **{**rest, "state": state, "step": 7, **options})


def call_read(arrays: dict, update=UPDATE, **options) -> None:
    rest = {name: arrays[name] for name in ("out", "weight", "indices")}
    state = {"prev_iter": arrays["prev_iter"]}
    coldrow.read_(update=update, **{**rest, "state": state, "step": 7, **options})


def make_read_arrays(library: str = "numpy") -> dict:
    arrays = make_arrays(library)
    return {"out": arrays.pop("grad"), **arrays}


both_libraries = pytest.mark.parametrize("library", ["numpy", "torch"])
both_calls = pytest.mark.parametrize("call", [call_rowwise, call_apply])


def cast(x, dtype: str):
    return x.astype(dtype) if isinstance(x, np.ndarray) else x.to(getattr(torch, dtype))


def bits_as(x, dtype: str):
    return x.view(dtype) if isinstance(x, np.ndarray) else x.view(getattr(torch, dtype))


def ints(x, *values: int):
    """An index array of the library of ``x``."""
    return np.array(values) if isinstance(x, np.ndarray) else torch.tensor(values)


def spread(x):
    """The same values in every second element of twice the memory."""
    if isinstance(x, np.ndarray):
        return np.repeat(x, 2, axis=-1)[..., ::2]
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def column_major(x):
    return x.T.copy().T if isinstance(x, np.ndarray) else x.T.contiguous().T


def expanded(x):
    """The first row, repeated with stride 0."""
    if isinstance(x, np.ndarray):
        return np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:]))
    return x[:1].expand(x.shape)


# The argument named first is replaced by what the function makes of it.
ARRAYS = {
    f"weight: got dtype float64 ... {FLOATS}": (TypeError, lambda x: cast(x, "float64")),
    f"weight: got dtype int32 ... {FLOATS}": (TypeError, lambda x: cast(x, "int32")),
    f"grad: got dtype float64 ... {FLOATS}": (TypeError, lambda x: cast(x, "float64")),
    f"grad: got dtype int8 ... {FLOATS}": (TypeError, lambda x: cast(x, "int8")),
    f"indices: got dtype int16 ... {INTS}": (TypeError, lambda x: cast(x, "int16")),
    f"indices: got dtype uint8 ... {INTS}": (TypeError, lambda x: cast(x, "uint8")),
    f"indices: got dtype bool ... {INTS}": (TypeError, lambda x: cast(x, "bool")),
    f"indices: got dtype float32 ... {INTS}": (TypeError, lambda x: cast(x, "float32")),
    "momentum1: got dtype float64 ... accepted: float32": (TypeError, lambda x: cast(x, "float64")),
    "momentum1: got dtype float16 ... accepted: float32": (TypeError, lambda x: cast(x, "float16")),
    "prev_iter: got dtype int64 ... accepted: int32": (TypeError, lambda x: cast(x, "int64")),
    "prev_iter: got dtype float32 ... accepted: int32": (TypeError, lambda x: cast(x, "float32")),
    "weight: got float32[4] ... accepted: shape [any, any]": (ValueError, lambda x: x[0]),
    "weight: got float32[1, 6, 4] ... accepted: shape [any, any]": (ValueError, lambda x: x[None]),
    "weight: got float32[6, 0] ... accepted: dim of at least 1": (ValueError, lambda x: x[:, :0]),
    "grad: got float32[2, 4] ... accepted: shape [3, 4]": (ValueError, lambda x: x[:2]),
    "grad: got float32[3, 3] ... accepted: shape [3, 4]": (ValueError, lambda x: x[:, :3]),
    "grad: got float32[4] ... accepted: shape [3, 4]": (ValueError, lambda x: x[0]),
    "indices: got int64[1, 3] ... accepted: shape [any]": (ValueError, lambda x: x[None]),
    "momentum1: got float32[5] ... accepted: shape [6]": (ValueError, lambda x: x[:5]),
    "momentum1: got float32[1, 6] ... accepted: shape [6]": (ValueError, lambda x: x[None]),
    "prev_iter: got int32[5] ... accepted: shape [6]": (ValueError, lambda x: x[1:]),
    "weight: float32[6, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "weight: float32[6, 4] is not contiguous ... row-major": (ValueError, column_major),
    "grad: float32[3, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "indices: int64[3] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "weight: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    "grad: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    "indices: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    "momentum1: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    "prev_iter: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    "indices: got 6 at position 1 ... accepted: 0 to 5": (IndexError, lambda x: ints(x, 1, 6, 7)),
    "indices: got -1 at position 2 ... accepted: 0 to 5": (IndexError, lambda x: ints(x, 1, 4, -1)),
    "indices: got -2147483648 at position 0 ... accepted: 0 to 5": (
        IndexError,
        lambda x: cast(ints(x, -(2**31), 2**31 - 1, 0), "int32"),
    ),
    "indices: got 4294967297 at position 1 ... accepted: 0 to 5": (
        IndexError,
        lambda x: ints(x, 0, 2**32 + 1, 0),
    ),
    f"weight: got <class 'list'> ... {ARRAY}": (TypeError, lambda x: x.tolist()),
    f"grad: got <class 'float'> ... {ARRAY}": (TypeError, lambda x: 1.0),
    f"indices: got <class 'list'> ... {ARRAY}": (TypeError, lambda x: [1, 4, 1]),
    "prev_iter: got ... None ... accepted": (TypeError, lambda x: None),
}


@both_libraries
@both_calls
@pytest.mark.parametrize("says", ARRAYS)
def test_array_that_is_not_accepted(library, call, says):
    kind, change = ARRAYS[says]
    name = says.partition(":")[0]
    arrays = make_arrays(library)
    given = arrays | {name: change(arrays[name])}
    with refused(kind, says, unchanged=[*arrays.values(), *given.values()]):
        call(given)


SHARED = {
    "weight and grad": lambda a: {"grad": a["weight"][3:]},
    "momentum1 and prev_iter": lambda a: {"momentum1": bits_as(a["prev_iter"], "float32")},
    "weight and momentum1": lambda a: {"momentum1": a["weight"].reshape(-1)[:ROWS]},
    "prev_iter and indices": lambda a: {"indices": a["prev_iter"][1:4]},
}


@both_libraries
@both_calls
@pytest.mark.parametrize("names", SHARED)
def test_arrays_that_share_memory(library, call, names):
    arrays = make_arrays(library)
    given = arrays | SHARED[names](arrays)
    with refused(ValueError, "", [*arrays.values(), *given.values()]) as caught:
        call(given)
    assert set(str(caught.value).partition(":")[0].split(" and ")) == set(names.split(" and "))
    assert "share memory, accepted: arrays that do not overlap" in str(caught.value)
    for name, array in make_arrays(library).items():
        assert bits(arrays[name]) == bits(array)


@both_calls
@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_read_only_numpy_array(call, name):
    arrays = make_arrays()
    arrays[name].flags.writeable = False
    says = f"{name}: is read-only ... accepted: a writable array"
    with refused(ValueError, says, unchanged=arrays.values()):
        call(arrays)


@both_calls
def test_arrays_that_are_only_read_may_be_read_only(call):
    arrays, same = make_arrays(), make_arrays()
    arrays["grad"].flags.writeable = arrays["indices"].flags.writeable = False
    call(arrays)
    call(same)
    assert bits(arrays["weight"]) == bits(same["weight"]) != bits(make_arrays()["weight"])


OPTIONS = {
    f"step: got 0 ... {STEPS}": (ValueError, 0),
    f"step: got -3 ... {STEPS}": (ValueError, -3),
    f"step: got 2147483648 ... {STEPS}": (ValueError, 2**31),
    f"step: got 7.0 ... {STEPS}": (TypeError, 7.0),
    f"step: got '7' ... {STEPS}": (TypeError, "7"),
    f"step: got True ... {STEPS}": (TypeError, True),
    f"step: got None ... {STEPS}": (TypeError, None),
    f"step: got np.float32(7.0) ... {STEPS}": (TypeError, np.float32(7)),
    f"step: got tensor(7.) ... {STEPS}": (TypeError, torch.tensor(7.0)),
    f"step: got tensor([7, 8]) ... {STEPS}": (TypeError, torch.tensor([7, 8])),
    f"lr: got nan ... {NUMBER}": (ValueError, NAN),
    f"lr: got -0.1 ... {NUMBER}": (ValueError, -0.1),
    f"lr: got inf ... {NUMBER}": (ValueError, INF),
    f"lr: got '0.1' ... {NUMBER}": (TypeError, "0.1"),
    f"lr: got True ... {NUMBER}": (TypeError, True),
    f"lr: got [0.1] ... {NUMBER}": (TypeError, [0.1]),
    f"lr: got 1000000 ... {NUMBER}": (ValueError, 10**400),
    f"lr: got tensor([0.5000, 0.2500]) ... {NUMBER}": (TypeError, torch.tensor([0.5, 0.25])),
    "on_nonfinite: got 'ignore' ... accepted: 'skip', 'raise', 'propagate'": (ValueError, "ignore"),
    "on_nonfinite: got None ... accepted: 'skip', 'raise', 'propagate'": (
        (TypeError, ValueError),
        None,
    ),
    "table: got -1 ... accepted: an integer from 0": (ValueError, -1),
    "table: got 1.5 ... accepted: an integer from 0": (TypeError, 1.5),
    "row_offset: got -1 ... accepted: an integer from 0": (ValueError, -1),
    "col_offset: got -1 ... accepted: an integer from 0": (ValueError, -1),
}


@both_calls
@pytest.mark.parametrize("says", OPTIONS)
def test_option_that_is_not_accepted(call, says):
    kind, value = OPTIONS[says]
    arrays = make_arrays()
    with refused(kind, says, unchanged=arrays.values()):
        call(arrays, **{says.partition(":")[0]: value})


@pytest.mark.parametrize("name", ["lr", "eps", "ema_beta", "ar_alpha", "min_shrinkage"])
@pytest.mark.parametrize("value", [NAN, -0.5, INF, "1", None])
def test_hyper_parameter_that_is_not_accepted(name, value):
    arrays = make_arrays()
    accepted = FRACTION if name in ("ema_beta", "min_shrinkage") else NUMBER
    kind = ValueError if isinstance(value, float) else TypeError
    with refused(kind, f"{name}: got {value!r} ... {accepted}", unchanged=arrays.values()):
        call_rowwise(arrays, **{name: value})


@pytest.mark.parametrize("name", ["ema_beta", "min_shrinkage"])
def test_fraction_above_one(name):
    arrays = make_arrays()
    with refused(ValueError, f"{name}: got 1.5 ... {FRACTION}", unchanged=arrays.values()):
        call_rowwise(arrays, **{name: 1.5})


def test_rounding_that_is_not_one():
    arrays = make_arrays()
    says = "rounding: got 'nearest' ... accepted: an instance of coldrow.Rounding"
    with refused(TypeError, says, unchanged=arrays.values()):
        call_rowwise(arrays, rounding="nearest")


@pytest.mark.parametrize("value", [-1, 2**31])
def test_epoch_start_out_of_range(value):
    arrays = make_arrays()
    says = f"epoch_start: got {value} ... accepted: an integer from 0 to 2147483647"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_apply(arrays, epoch_start=value)


@both_libraries
@both_calls
@pytest.mark.parametrize(("step", "row", "last"), [(1, 1, 3), (4, 4, 5), (5, 4, 5)])
def test_step_that_does_not_advance(library, call, step, row, last):
    arrays = make_arrays(library)
    accepted = f"accepted: more than prev_iter of every row touched; row {row} has {last}"
    with refused(ValueError, f"step: got {step} ... {accepted}", unchanged=arrays.values()):
        call(arrays, step=step)


@both_calls
def test_step_need_not_pass_rows_that_are_not_touched(call):
    arrays = make_arrays()
    arrays["prev_iter"][2] = LAST
    call(arrays, step=6)
    assert arrays["prev_iter"].tolist() == [0, 6, LAST, 0, 6, 1]


def test_last_step_is_accepted():
    arrays = make_arrays()
    call_apply(arrays, step=LAST)
    assert arrays["prev_iter"][[1, 4]].tolist() == [LAST, LAST]


# What is written into the gradients of rows 1, 4, 1, and the row that then is not finite.
NONFINITE = {
    "nan": ((1, 2), NAN, 4),
    "inf": ((1, 2), INF, 4),
    "square overflows": ((1, slice(None)), 1e30, 4),
    "sum of duplicates overflows": (([0, 2], 0), 3e38, 1),
}


@both_libraries
@both_calls
@pytest.mark.parametrize("case", NONFINITE)
def test_nonfinite_gradient_is_refused_by_default(library, call, case):
    where, value, row = NONFINITE[case]
    arrays = make_arrays(library)
    arrays["grad"][where] = value
    accepted = "accepted: finite gradients ... on_nonfinite='skip' or 'propagate'"
    says = f"grad: the update of row {row} is not finite (1 such rows) ... {accepted}"
    with refused(ValueError, says, unchanged=arrays.values()):
        call(arrays)


@pytest.mark.parametrize(
    ("state", "got"),
    [
        ({}, "[]"),
        ({"momentum1": 0}, "['momentum1']"),
        ({"prev_iter": 0}, "['prev_iter']"),
        ({"momentum1": 0, "momentum2": 0, "prev_iter": 0}, "['momentum1', 'momentum2', 'prev_"),
        ([0, 0], "list"),
        (None, "NoneType"),
    ],
)
def test_state_that_is_not_the_optimizers(state, got):
    arrays = make_arrays()
    says = f"state: got {got} ... accepted: a dict with ['momentum1', 'prev_iter']"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_apply(arrays, state=state)


@pytest.mark.parametrize("update", [None, "adam", coldrow.RowwiseRMSprop()])
def test_update_that_is_not_one(update):
    arrays = make_read_arrays()
    says = f"update: got {update!r} ... {AN_UPDATE}"
    with refused(TypeError, says, unchanged=arrays.values()):
        call_read(arrays, update=update)
    arrays = make_arrays()
    with refused(TypeError, says, unchanged=arrays.values()):
        call_apply(arrays, update=update)
    with refused(TypeError, says):
        coldrow.init_state(update, ROWS, DIM, arrays["weight"])


class OnDevice:
    """A NumPy array that claims over DLPack to lie in CUDA memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **_):
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLTensor: void* data; int32_t device_type; ...
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2
        return capsule


@pytest.mark.host_only
@pytest.mark.parametrize("name", ["grad", "indices", "momentum1", "prev_iter"])
def test_array_on_another_device_than_weight(name):
    arrays = make_arrays()
    says = f"{name}: is on cuda:0 ... accepted: cpu"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_apply(arrays | {name: OnDevice(arrays[name])})


@pytest.mark.host_only
@pytest.mark.parametrize(
    ("build", "why"),
    [
        (None, "this build has no CUDA support, see coldrow.cuda.is_built()"),
        (
            (0, "no driver"),
            "no CUDA device can be used: no driver, see coldrow.cuda.is_available()",
        ),
        ((0, ""), "no CUDA device can be used: there is no CUDA device"),
    ],
)
def test_device_that_no_kernel_can_run_on(monkeypatch, build, why):
    native = types.SimpleNamespace(devices=lambda: build)
    engine = None if build is None else _engines.Device(native)
    monkeypatch.setattr(_engines, "device", engine)
    assert coldrow.cuda.is_built() == (build is not None)
    assert not coldrow.cuda.is_available()
    arrays = make_arrays()
    says = f"weight: got an array on 'cuda:0' ... accepted: 'cpu' ({why}"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_apply(arrays | {"weight": OnDevice(arrays["weight"])})
    for device in ("cuda", "cuda:1"):
        with refused(ValueError, f"device: got '{device}' ... accepted: 'cpu' ({why}"):
            make_module(device=device)


# State that is element-wise, beside one that is not.
BY_ELEMENT = coldrow.RowUpdate(coldrow.Adam(bias_correction="row"), UPDATE.decay, UPDATE.rounding)


def make_adam_arrays(library: str = "numpy") -> dict:
    rng = np.random.default_rng(1)
    made = make_arrays()
    made["touches"] = np.array([0, 2, 1, 0, 4, 1], np.float32)
    for name in ("momentum1", "momentum2"):
        made[name] = rng.random((ROWS, DIM), dtype=np.float32)
    return made if library == "numpy" else {k: torch.from_numpy(v) for k, v in made.items()}


def call_adam(arrays: dict, state: object = None, **options) -> None:
    names = ("prev_iter", "touches", "momentum1", "momentum2")
    rest = {k: v for k, v in arrays.items() if k not in names}
    if state is None:
        state = {k: v for k, v in arrays.items() if k in names}
    coldrow.apply_(BY_ELEMENT, **rest, state=state, **{"step": 7, **options})


def transposed(x):
    return x.T.copy() if isinstance(x, np.ndarray) else x.T.contiguous()


OF_A_ROW, OF_AN_ELEMENT = "accepted: shape [6] (one per row)", "accepted: shape [6, 4] (one per el"
ELEMENT_WISE = {
    f"momentum1: got float32[6] ... {OF_AN_ELEMENT}": (
        ValueError,
        lambda x: x[:, 0],
    ),
    f"momentum1: got float32[24] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x.reshape(-1)),
    f"momentum1: got float32[4, 6] ... {OF_AN_ELEMENT}": (ValueError, transposed),
    f"momentum1: got float32[5, 4] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x[:5]),
    f"momentum2: got float32[6, 3] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x[:, :3]),
    f"momentum2: got float32[1, 6, 4] ... {OF_AN_ELEMENT}": (ValueError, lambda x: x[None]),
    f"touches: got float32[6, 1] ... {OF_A_ROW}": (ValueError, lambda x: x[:, None]),
    f"touches: got float32[5] ... {OF_A_ROW}": (ValueError, lambda x: x[1:]),
    "momentum1: got dtype float64 ... accepted: float32": (TypeError, lambda x: cast(x, "float64")),
    "momentum2: got dtype float16 ... accepted: float32": (TypeError, lambda x: cast(x, "float16")),
    "momentum2: got dtype int32 ... accepted: float32": (TypeError, lambda x: cast(x, "int32")),
    "touches: got dtype int32 ... accepted: float32": (TypeError, lambda x: cast(x, "int32")),
    "momentum1: float32[6, 4] is not contiguous ... row-major": (ValueError, column_major),
    "momentum1: float32[6, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "momentum2: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    f"momentum2: got <class 'list'> ... {ARRAY}": (TypeError, lambda x: x.tolist()),
    "momentum2: got ... None ... accepted": (TypeError, lambda x: None),
}


@both_libraries
@pytest.mark.parametrize("says", ELEMENT_WISE)
def test_element_wise_state_that_is_not_accepted(library, says):
    kind, change = ELEMENT_WISE[says]
    name = says.partition(":")[0]
    arrays = make_adam_arrays(library)
    given = arrays | {name: change(arrays[name])}
    with refused(kind, says, unchanged=[*arrays.values(), *given.values()]):
        call_adam(given)
    call_adam(arrays)  # as they were they are accepted


def overlapping(arrays: dict, one: str, other: str) -> dict:
    """Both in one memory: the last element of one is the first of the other."""
    parts = [arrays[one], arrays[other]]
    library = np if isinstance(parts[0], np.ndarray) else torch
    flat, n = library.concatenate(parts).reshape(-1), ROWS * DIM
    return {
        one: flat[:n].reshape(ROWS, DIM),
        other: flat[n - 1 : 2 * n - 1].reshape(ROWS, DIM),
    }


SHARED_BY_ELEMENT = {
    "weight and momentum1": lambda a: {"momentum1": a["weight"]},
    "weight and momentum2": lambda a: overlapping(a, "weight", "momentum2"),
    "momentum2 and weight": lambda a: overlapping(a, "momentum2", "weight"),
    "momentum1 and momentum2": lambda a: {"momentum2": a["momentum1"]},
    "momentum2 and momentum1": lambda a: overlapping(a, "momentum2", "momentum1"),
    "momentum1 and grad": lambda a: {"grad": a["momentum1"][2:5]},
    "momentum2 and touches": lambda a: {"touches": a["momentum2"][:, 1]},
    "momentum1 and prev_iter": lambda a: {"prev_iter": bits_as(a["momentum1"], "int32")[:, 3]},
    "touches and prev_iter": lambda a: {"prev_iter": bits_as(a["touches"], "int32")},
}


@both_libraries
@pytest.mark.parametrize("names", SHARED_BY_ELEMENT)
def test_element_wise_state_that_shares_memory(library, names):
    arrays = make_adam_arrays(library)
    given = arrays | SHARED_BY_ELEMENT[names](arrays)
    with refused(ValueError, "", [*arrays.values(), *given.values()]) as caught:
        call_adam(given)
    assert "share memory, accepted: arrays that do not overlap" in str(caught.value)
    assert set(str(caught.value).partition(":")[0].split(" and ")) == set(names.split(" and "))


@pytest.mark.parametrize("name", ["touches", "momentum1", "momentum2"])
def test_read_only_element_wise_state(name):
    arrays = make_adam_arrays()
    arrays[name].flags.writeable = False
    says = f"{name}: is read-only ... accepted: a writable array"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_adam(arrays)


def test_neighbours_in_one_memory_are_accepted():
    """What touches without overlapping: moments one after the other, scalars in one record."""
    arrays, memory = make_adam_arrays(), np.zeros((2, ROWS, DIM), np.float32)
    records = np.zeros((ROWS, 2), np.int32)
    given = dict(arrays)
    for name, view in (
        ("momentum1", memory[0]),
        ("momentum2", memory[1]),
        ("prev_iter", records[:, 0]),
        ("touches", records.view(np.float32)[:, 1]),
    ):
        view[...] = arrays[name]
        given[name] = view
    call_adam(given | {"weight": arrays["weight"].copy()})
    call_adam(arrays)
    for name in ("momentum1", "momentum2", "prev_iter", "touches"):
        assert bits(given[name].copy()) == bits(arrays[name])


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"momentum2": None}, "['momentum1', 'prev_iter', 'touches']"),
        ({"touches": None}, "['momentum1', 'momentum2', 'prev_iter']"),
        ({"prev_iter": None}, "['momentum1', 'momentum2', 'touches']"),
        ({"momentum3": 0}, "['momentum1', 'momentum2', 'momentum3', 'prev_iter', 'touches']"),
        ({"momentum2": None, "Momentum2": 0}, "['Momentum2', 'momentum1', 'prev_iter', 'touches']"),
    ],
)
def test_element_wise_state_with_missing_or_extra_arrays(change, got):
    arrays = make_adam_arrays()
    state = {k: arrays[k] for k in ("prev_iter", "touches", "momentum1", "momentum2")}
    for name, array in change.items():
        if array is None:
            del state[name]
        else:
            state[name] = arrays["momentum1"].copy()
    names = "['momentum1', 'momentum2', 'prev_iter', 'touches']"
    says = f"state: got {got} ... accepted: a dict with {names}"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_adam(arrays, state=state)


@pytest.mark.host_only
@pytest.mark.parametrize("name", ["touches", "momentum1", "momentum2"])
def test_element_wise_state_on_another_device_than_weight(name):
    arrays = make_adam_arrays()
    says = f"{name}: is on cuda:0 ... accepted: cpu"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_adam(arrays | {name: OnDevice(arrays[name])})


READ_ARRAYS = {
    f"out: got dtype float64 ... {FLOATS}": (TypeError, lambda x: cast(x, "float64")),
    "out: got float32[2, 4] ... accepted: shape [3, 4]": (ValueError, lambda x: x[:2]),
    "out: float32[3, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    "out: has stride 0 in dimension 0 ... accepted: ... distinct": (ValueError, expanded),
    f"weight: got dtype float64 ... {FLOATS}": (TypeError, lambda x: cast(x, "float64")),
    "weight: float32[6, 4] is not contiguous ... accepted: a contiguous": (ValueError, spread),
    f"indices: got dtype int16 ... {INTS}": (TypeError, lambda x: cast(x, "int16")),
    "indices: got -2 at position 1 ... accepted: 0 to 5": (IndexError, lambda x: ints(x, 0, -2, 9)),
    "prev_iter: got dtype int64 ... accepted: int32": (TypeError, lambda x: cast(x, "int64")),
    "prev_iter: got int32[2] ... accepted: shape [6]": (ValueError, lambda x: x[:2]),
}


@both_libraries
@pytest.mark.parametrize("says", READ_ARRAYS)
def test_read_of_an_array_that_is_not_accepted(library, says):
    kind, change = READ_ARRAYS[says]
    name = says.partition(":")[0]
    arrays = make_read_arrays(library)
    given = arrays | {name: change(arrays[name])}
    with refused(kind, says, unchanged=[*arrays.values(), *given.values()]):
        call_read(given)


def test_read_into_the_table_itself_or_a_read_only_array():
    arrays = make_read_arrays()
    given = arrays | {"out": arrays["weight"][:3]}
    with refused(ValueError, "out and weight: share memory ... accepted", arrays.values()):
        call_read(given)
    arrays["out"].flags.writeable = False
    with refused(ValueError, "out: is read-only ... accepted: a writable", arrays.values()):
        call_read(arrays)


@pytest.mark.parametrize(
    ("says", "value"),
    [
        ("step: got 0 ... accepted: an integer from 1", 0),
        ("step: got 2147483649 ... accepted: an integer from 1 to 2147483648", 2**31 + 1),
        (f"lr: got nan ... {NUMBER}", NAN),
        ("epoch_start: got -1 ... accepted: an integer from 0", -1),
        ("state: got no prev_iter ... accepted: a dict with 'prev_iter'", {}),
    ],
)
def test_read_option_that_is_not_accepted(says, value):
    arrays = make_read_arrays()
    with refused(ValueError, says, unchanged=arrays.values()):
        call_read(arrays, **{says.partition(":")[0]: value})


@pytest.mark.parametrize(
    ("says", "kind", "value"),
    [
        ("num_rows: got -1 ... accepted: an integer from 0", ValueError, -1),
        ("num_rows: got 2.5 ... accepted: an integer from 0", TypeError, 2.5),
        ("dim: got 0 ... accepted: an integer from 1", ValueError, 0),
        ("like: got list ... accepted: a torch, NumPy or CuPy array", TypeError, [0.0]),
    ],
)
def test_init_state_of_something_else(says, kind, value):
    arguments = {"num_rows": ROWS, "dim": DIM, "like": np.zeros(1)}
    with refused(kind, says):
        coldrow.init_state(UPDATE, **arguments | {says.partition(":")[0]: value})


# ---------------------------------------------------------------------------------------- policies

c = coldrow
NORMAL = "accepted: a number >= 1.17549e-38 and finite"
BELOW_ONE = "accepted: a number >= 0 and <= 0.9999999404"  # the largest float32 below 1
POLICIES = {
    f"lr: got -1 ... {NUMBER}": (ValueError, lambda: c.RowwiseRMSprop(lr=-1)),
    f"eps: got nan ... {NUMBER}": (ValueError, lambda: c.RowwiseRMSprop(eps=NAN)),
    f"ema_beta: got 1.01 ... {FRACTION}": (ValueError, lambda: c.RowwiseRMSprop(ema_beta=1.01)),
    f"lr: got inf ... {NUMBER}": (ValueError, lambda: c.SGD(lr=INF)),
    f"lr: got None ... {NUMBER}": (TypeError, lambda: c.SGD(lr=None)),
    f"eps: got -0.1 ... {NUMBER}": (ValueError, lambda: c.RowwiseAdagrad(eps=-0.1)),
    f"eps: got 0 ... {NORMAL}": (ValueError, lambda: c.Adagrad(eps=0)),
    f"eps: got 1e-40 ... {NORMAL}": (ValueError, lambda: c.Adagrad(eps=1e-40)),
    f"eps: got 0.0 ... {NORMAL}": (ValueError, lambda: c.Adam(eps=0.0)),
    f"eps: got '0' ... {NORMAL}": (TypeError, lambda: c.PartialRowwiseAdam(eps="0")),
    f"eps: got -1.0 ... {NORMAL}": (ValueError, lambda: c.PartialRowwiseAdam(eps=-1.0)),
    f"beta1: got 1 ... {BELOW_ONE}": (ValueError, lambda: c.Adam(beta1=1)),
    f"beta1: got -0.1 ... {BELOW_ONE}": (ValueError, lambda: c.PartialRowwiseAdam(beta1=-0.1)),
    f"beta2: got 1.0 ... {BELOW_ONE}": (ValueError, lambda: c.PartialRowwiseAdam(beta2=1.0)),
    # In float32 that would be 1.
    f"beta2: got 0.99999999 ... {BELOW_ONE}": (ValueError, lambda: c.Adam(beta2=0.99999999)),
    f"beta2: got nan ... {BELOW_ONE}": (ValueError, lambda: c.Adam(beta2=NAN)),
    "bias_correction: got 'step' ... accepted: 'clock', 'row'": (
        ValueError,
        lambda: c.Adam(bias_correction="step"),
    ),
    "bias_correction: got True ... accepted: 'clock', 'row'": (
        ValueError,
        lambda: c.PartialRowwiseAdam(bias_correction=True),
    ),
    f"alpha: got inf ... {NUMBER}": (ValueError, lambda: c.LinearClipped(alpha=INF)),
    f"min_shrinkage: got 2 ... {FRACTION}": (ValueError, lambda: c.LinearClipped(0.1, 2)),
    f"alpha: got 'a' ... {NUMBER}": (TypeError, lambda: c.CumulativeLinear(alpha="a")),
    "CumulativeLinear: got neither ... accepted: exactly one of alpha and half_life": (
        TypeError,
        lambda: c.CumulativeLinear(),
    ),
    "CumulativeLinear: got alpha and half_life ... accepted: exactly one of": (
        TypeError,
        lambda: c.CumulativeLinear(alpha=1, half_life=2),
    ),
    "half_life: got 0 ... accepted: a number > 0": (
        ValueError,
        lambda: c.CumulativeLinear(half_life=0),
    ),
    "steps_per_epoch: got -5 ... accepted: a number > 0": (
        ValueError,
        lambda: c.CumulativeLinear.for_epoch(-5),
    ),
    "steps_per_epoch: got nan ... accepted: a number > 0": (
        ValueError,
        lambda: c.EpochGated.for_epoch(NAN),
    ),
    f"weight_decay: got -1 ... {NUMBER}": (ValueError, lambda: c.Exponential(weight_decay=-1)),
    "Exponential: got neither ... accepted: exactly one of weight_decay and half_life": (
        TypeError,
        lambda: c.Exponential(),
    ),
    f"weight_decay: got nan ... {NUMBER}": (ValueError, lambda: c.Constant(NAN)),
    "decay: got EpochReset() ... accepted: a decay that is not epoch-aware": (
        TypeError,
        lambda: c.EpochGated(c.EpochReset()),
    ),
    "seed: got -1 ... accepted: an integer from 0": (ValueError, lambda: c.Stochastic(seed=-1)),
    "seed: got 1844 ... accepted: an integer from 0": (ValueError, lambda: c.Stochastic(2**64)),
    "seed: got 0.5 ... accepted: an integer from 0": (TypeError, lambda: c.Stochastic(0.5)),
    "optimizer: got 'sgd' ... accepted: an instance of coldrow.Optimizer": (
        TypeError,
        lambda: c.RowUpdate(optimizer="sgd"),
    ),
    "decay: got 0.1 ... accepted: an instance of coldrow.Decay": (
        TypeError,
        lambda: c.RowUpdate(decay=0.1),
    ),
    "decay_state: got 'yes' ... accepted: True or False": (
        TypeError,
        lambda: c.RowUpdate(decay_state="yes"),
    ),
    "policy: got 'Sgd' ... accepted: RowUpdate, SGD, RowwiseRMSprop": (
        ValueError,
        lambda: c.RowUpdate.from_dict({"policy": "Sgd"}),
    ),
}


@pytest.mark.parametrize("says", POLICIES)
def test_policy_that_is_not_accepted(says):
    kind, build = POLICIES[says]
    with refused(kind, says):
        build()


def test_the_least_and_largest_that_is_accepted():
    assert c.RowwiseAdagrad(eps=0).eps == c.RowwiseRMSprop(eps=0).eps == 0
    for kind in (c.Adam, c.PartialRowwiseAdam):
        assert kind(beta1=0, beta2=0, eps=1.17549436e-38).beta1 == 0
        assert kind(beta1=1 - 2.0**-24, beta2=1 - 2.0**-24).beta2 < np.float32(1)


# ------------------------------------------------------------------------------------------ module


def make_module(**options) -> TableBatchedEmbeddingBags:
    """Two tables of two widths and a feature each, trained for one step."""
    torch.manual_seed(0)
    emb = TableBatchedEmbeddingBags([Table("user", 6, 4), Table("item", 5, 2)], UPDATE, **options)
    out = forward(emb)
    sum(part.sum() for part in out).backward()
    if not emb.fused:
        emb.step()
        emb.zero_grad()
    return emb


def batch(**changes) -> dict:
    """Bags [1, 4] and [1] of user, [0] and [2] of item."""
    given = {"indices": torch.tensor([1, 4, 1, 0, 2]), "offsets": torch.tensor([0, 2, 3, 4, 5])}
    return given | changes


def forward(emb, **changes):
    return emb(**batch(**changes))


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


CLOCKS = {
    f"clock: got 0 ... {STEPS}": (ValueError, 0),  # its clock is at 1
    f"clock: got -1 ... {STEPS}": (ValueError, -1),
    f"clock: got 2147483648 ... {STEPS}": (ValueError, 2**31),
    f"clock: got 2.5 ... {STEPS}": (TypeError, 2.5),
    f"clock: got True ... {STEPS}": (TypeError, True),
}

LRS = {
    f"lr: got -1.0 ... {NUMBER}": (ValueError, -1.0),
    f"lr: got nan ... {NUMBER}": (ValueError, NAN),
    f"lr: got inf ... {NUMBER}": (ValueError, INF),
    f"lr: got '0.1' ... {NUMBER}": (TypeError, "0.1"),
    f"lr: got None ... {NUMBER}": (TypeError, None),
}

fused_or_not = pytest.mark.parametrize("fused", [True, False])


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
    emb.param_groups[0]["lr"] = value
    with refused(kind, says):
        forward(emb)
    emb.lr = 0.1
    assert bits(emb) == before


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


# ---------------------------------------------------------------------------------------- optimizer


def make_parameter(rows: int = 6, dim: int = 4) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(rows, dim))


OPTIMIZERS = {
    "RowwiseRMSpropAR": RowwiseRMSpropAR,
    "SparseOptimizer": functools.partial(SparseOptimizer, update=UPDATE),
}
EMBEDDING = "accepted: embedding weights [E, D]"
PARAMETERS = {
    f"params: got [6] ... {EMBEDDING}": (ValueError, lambda: nn.Parameter(torch.zeros(6))),
    f"params: got [6, 2, 2] ... {EMBEDDING}": (
        ValueError,
        lambda: nn.Parameter(torch.zeros(6, 2, 2)),
    ),
    f"params: got str ... {EMBEDDING}": (ValueError, lambda: "weight"),
    f"params: got dtype torch.float64 ... {FLOATS}": (
        TypeError,
        lambda: nn.Parameter(torch.zeros(6, 4, dtype=torch.float64)),
    ),
    "params: got a table of a read-charged module ... accepted: touch charging only": (
        ValueError,
        lambda: make_module(fused=False, charge="read").weights["user"],
    ),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("says", PARAMETERS)
def test_parameter_that_is_not_accepted(build, says):
    kind, parameter = PARAMETERS[says]
    with refused(kind, says):
        build([parameter()])


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("says", LRS)
def test_optimizer_lr_that_is_not_accepted(build, says):
    kind, lr = LRS[says]
    with refused(kind, says):
        build([{"params": [make_parameter()], "lr": lr}])
    optimizer = build([make_parameter()])
    optimizer.param_groups[0]["lr"] = lr
    with refused(kind, says, unchanged=[optimizer]):
        optimizer.step()


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizer_on_nonfinite_that_is_not_accepted(build):
    with refused(ValueError, "on_nonfinite: got 'ignore' ... 'skip', 'raise', 'propagate'"):
        build([make_parameter()], on_nonfinite="ignore")


@pytest.mark.parametrize("update", [None, "adam", coldrow.NoDecay()])
def test_optimizer_of_something_that_is_not_an_update(update):
    says = f"update: got {update!r} ... {AN_UPDATE}"
    with refused(TypeError, says):
        SparseOptimizer([make_parameter()], update)
    with refused(TypeError, says):
        SparseOptimizer([{"params": [make_parameter()], "update": update}], UPDATE)


@pytest.mark.parametrize("name", ["ar_alpha", "eps", "ema_beta", "min_shrinkage"])
@pytest.mark.parametrize("value", [NAN, -1.0, INF])
def test_optimizer_hyper_parameter_that_is_not_accepted(name, value):
    accepted = FRACTION if name in ("ema_beta", "min_shrinkage") else NUMBER
    with refused(ValueError, f"{name}: got {value!r} ... {accepted}"):
        RowwiseRMSpropAR([make_parameter()], **{name: value})
    with refused(ValueError, f"{name}: got {value!r} ... {accepted}"):
        RowwiseRMSpropAR([{"params": [make_parameter()], name: value}])


def sparse(parameter: nn.Parameter, rows: list[int], value: float = 1.0) -> torch.Tensor:
    """A sparse gradient of ``parameter``, constant."""
    values = torch.full((len(rows), parameter.shape[1]), value)
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, parameter.shape, check_invariants=False
    )


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS)
def trained(request):
    """An optimizer of two parameters, one step in, and the second parameter."""
    params = [make_parameter(), make_parameter(5, 2)]
    optimizer = request.param(params)
    for p in params:
        p.grad = sparse(p, [1, 2])
    optimizer.step()
    return optimizer, params[1]


@pytest.mark.parametrize(
    ("says", "gradient"),
    [
        ("grad: got layout torch.strided ... accepted: sparse gradients", torch.ones(5, 2)),
        ("grad: got ... accepted: sparse gradients", torch.ones(5, 2).to_sparse()),
    ],
)
def test_gradient_that_is_not_one_of_rows(trained, says, gradient):
    optimizer, parameter = trained
    parameter.grad = gradient
    with refused(TypeError, says, unchanged=[optimizer]):
        optimizer.step()


@pytest.mark.parametrize("row", [5, -1])
def test_gradient_of_a_row_that_is_not_there(trained, row):
    optimizer, parameter = trained
    parameter.grad = sparse(parameter, [0, row])
    says = f"indices: got {row} at position 1 ... accepted: 0 to 4"
    with refused(IndexError, says, unchanged=[optimizer]):
        optimizer.step()


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_nonfinite_gradient_of_the_last_parameter_changes_none(trained, value):
    optimizer, parameter = trained
    optimizer.on_nonfinite = "raise"
    parameter.grad = sparse(parameter, [4], value)
    says = "grad: the update of row 4 is not finite ... accepted: finite gradients"
    with refused(ValueError, says, unchanged=[optimizer]):
        optimizer.step()


@pytest.mark.parametrize("says", CLOCKS)
def test_optimizer_clock_that_is_not_accepted(trained, says):
    optimizer, _ = trained
    kind, value = CLOCKS[says]
    with refused(kind, says, unchanged=[optimizer]):
        optimizer.clock = value


def test_optimizer_clock_at_its_end(trained):
    optimizer, _ = trained
    optimizer.clock = LAST
    for call in (optimizer.step, optimizer.new_epoch):
        with pytest.raises(ValueError, match=r"got 2147483648.*accepted: .*2147483647"):
            call()
    assert optimizer.clock == LAST


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("momentum1", torch.zeros(5)),
        ("momentum1", torch.zeros(6, dtype=torch.float64)),
        ("prev_iter", torch.zeros(6)),
        ("prev_iter", torch.zeros(6, 2, dtype=torch.int32)),
    ],
)
def test_optimizer_state_that_does_not_fit(trained, name, bad):
    optimizer, _ = trained
    saved = optimizer.state_dict()
    saved["state"] = saved["state"] | {0: saved["state"][0] | {name: bad}}
    says = f"state {name}: got {bad.dtype} {list(bad.shape)} ... accepted: ... [6]"
    with refused(ValueError, says, unchanged=[optimizer]):
        optimizer.load_state_dict(saved)


# ------------------------------------------------------------------------------------------- memory

RESIZED = {
    0: "has no memory behind it ... accepted: an array",
    8: "its storage has 8 bytes ... accepted: a tensor whose storage was not freed or resized",
}


@both_calls
@pytest.mark.parametrize("size", RESIZED)
@pytest.mark.parametrize("name", ["weight", "grad", "indices", "momentum1", "prev_iter"])
def test_tensor_whose_storage_was_resized(call, name, size):
    arrays = make_arrays("torch")
    given = arrays | {name: arrays[name].clone()}
    given[name].untyped_storage().resize_(size)
    others = [array for key, array in given.items() if key != name]
    says = f"{name}: {RESIZED[size]}" if size else f"{name}: "
    with refused(ValueError, says, unchanged=[*arrays.values(), *others]):
        call(given)


@fused_or_not
def test_module_whose_table_was_freed(fused):
    emb = make_module(fused=fused)
    storage = emb.weights["item"].untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    others = [emb.weights["user"], *emb.state["user"].values(), *emb.state["item"].values()]
    with refused(ValueError, "weight: has no memory behind it ... accepted", unchanged=others):
        forward(emb)
    storage.resize_(size)
    emb.weights["item"].data.zero_()
    assert torch.isfinite(forward(emb)).all()  # and the module goes on


@both_libraries
def test_arrays_whose_owner_is_gone_are_accepted(library):
    """A view keeps its memory alive, whatever became of the names it had."""
    arrays, same = make_arrays(library), make_arrays(library)
    given = {name: array[:] for name, array in arrays.items()}
    del arrays
    gc.collect()
    call_apply(given)
    call_apply(same)
    for name, array in same.items():
        assert bits(given[name]) == bits(array)


@both_calls
@pytest.mark.parametrize("name", ["weight", "momentum1", "prev_iter"])
def test_memory_mapped_for_reading(call, name, tmp_path):
    arrays = make_arrays()
    file = tmp_path / "array"
    arrays[name].tofile(file)
    mapped = np.memmap(file, arrays[name].dtype, "r", shape=arrays[name].shape)
    says = f"{name}: is read-only ... accepted: a writable array"
    with refused(ValueError, says, unchanged=[*arrays.values(), mapped]):
        call(arrays | {name: mapped})
    assert file.read_bytes() == arrays[name].tobytes()


@contextlib.contextmanager
def short_of_memory(spare: int):
    """No more than ``spare`` bytes of address space beyond what the process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.host_only
@pytest.mark.parametrize("where", ["function", "module"])
def test_no_memory_for_the_workspace(where):
    many = 4_000_000
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if where == "function":
            arrays = make_arrays() | {
                "grad": np.ones((many, DIM), np.float32),
                "indices": np.zeros(many, np.int32),
            }
            unchanged = [arrays[name] for name in ("weight", "momentum1", "prev_iter")]
            call, after, rest = (lambda: call_apply(arrays)), call_apply, make_arrays()
        else:
            emb = make_module(pooling="sum")  # its workspace is kept, and is small
            zeros = torch.zeros(2 * many, dtype=torch.int32)
            offsets = torch.tensor([0, many, many, many, 2 * many], dtype=torch.int32)
            out = emb(zeros, offsets)
            unchanged = [emb]
            call, after, rest = (lambda: out.sum().backward()), forward, emb
        says = "workspace: no memory for ... bytes ... accepted: a batch that fits"
        with refused(MemoryError, says, unchanged=unchanged), short_of_memory(48 << 20):
            call()
        after(rest)  # a smaller one still goes
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- own policies

NO_FACTORS = {
    '__builtin_nanf("")': "nan",
    "__builtin_inff()": "inf",
    "-0.25f": "-0.250000",
    "1.5f": "1.500000",
}


@pytest.mark.host_only
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("gives", NO_FACTORS)
def test_decay_that_gives_no_factor(gives):
    source = (
        "struct Own { COLDROW_HD float operator()(std::int32_t gap, float) const { "
        f"return gap == 1 ? 1.0f : {gives}; }} }};"
    )
    update = coldrow.RowUpdate(coldrow.SGD(lr=0.1), coldrow.jit.decay("Own", source))
    arrays = make_arrays()
    state = {"prev_iter": arrays.pop("prev_iter")}
    del arrays["momentum1"]
    says = f"decay: gave the factor {NO_FACTORS[gives]} for row 1 ... accepted: 0 to 1"
    with refused(ValueError, says, unchanged=[*arrays.values(), *state.values()]):
        coldrow.apply_(update, **arrays, state=state, step=7)

    emb = TableBatchedEmbeddingBags(
        [Table("user", 6, 4), Table("item", 5, 2)], update, on_nonfinite="raise"
    )
    forward(emb).sum().backward()
    emb.clock += 1
    out = forward(emb)
    says = f"decay: gave the factor {NO_FACTORS[gives]} for row 1 of table 'user' ... accepted"
    with refused(ValueError, says, unchanged=[emb]):
        out.sum().backward()


# --------------------------------------------------------------------------------------------- page


@pytest.mark.host_only
def test_errors_page_is_what_was_said(request):
    """docs/errors.md, word for word, in the pinned environment; ``make errors`` writes it."""
    options = request.config.option
    pinned = (errors_page.ROOT / "constraints.txt").read_text()
    if f"torch=={torch.__version__.partition('+')[0]}\n" not in pinned:
        pytest.skip("messages quote torch's reprs; the page is that of the pinned release")
    if options.keyword or options.markexpr or any("::" in arg for arg in request.config.args):
        pytest.skip("not all tests ran")
    text = errors_page.render()
    if os.environ.get("COLDROW_WRITE_ERRORS"):
        errors_page.PAGE.write_text(text)
    assert errors_page.PAGE.read_text() == text, "docs/errors.md is stale: make errors"
