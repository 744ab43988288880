"""Bad arrays and options of the functions: one exception each, and not a byte changes."""

from __future__ import annotations

import types

import numpy as np
import pytest
import stand_in

import coldrow
from coldrow._backends import cuda

torch = pytest.importorskip("torch")
from refusals import (  # noqa: E402
    AN_UPDATE,
    ARRAY,
    DIM,
    FLOATS,
    FRACTION,
    INF,
    INTS,
    LAST,
    NAN,
    NUMBER,
    ROWS,
    STEPS,
    OnDevice,
    bits,
    bits_as,
    both_calls,
    both_libraries,
    call_apply,
    call_read,
    call_rowwise,
    cast,
    column_major,
    expanded,
    ints,
    make_arrays,
    make_module,
    make_read_arrays,
    refused,
    spread,
)

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


@pytest.mark.parametrize("value", [-1, 8, 2**31])
def test_epoch_start_out_of_range(value):
    arrays = make_arrays()
    says = f"epoch_start: got {value} ... accepted: an integer from 0 to 7"  # the step
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
def test_device_that_no_kernel_can_run_on(build, why):
    native = types.SimpleNamespace(devices=lambda: build)
    backend = None if build is None else cuda.Cuda(native)
    with stand_in.in_use(backend):
        refuses_devices(build, why)


def refuses_devices(build, why):
    assert coldrow.cuda.is_built() == (build is not None)
    assert not coldrow.cuda.is_available()
    arrays = make_arrays()
    says = f"weight: got an array on 'cuda:0' ... accepted: 'cpu' ({why}"
    with refused(ValueError, says, unchanged=arrays.values()):
        call_apply(arrays | {"weight": OnDevice(arrays["weight"])})
    for device in ("cuda", "cuda:1"):
        with refused(ValueError, f"device: got '{device}' ... accepted: 'cpu' ({why}"):
            make_module(device=device)
