"""Bad parameters, gradients and state of an optimizer: one exception each, and not a byte changes."""

from __future__ import annotations

import functools

import pytest

import coldrow

torch = pytest.importorskip("torch")
from refusals import (  # noqa: E402
    AN_UPDATE,
    CLOCKS,
    FLOATS,
    FRACTION,
    INF,
    LAST,
    LRS,
    NAN,
    NUMBER,
    UPDATE,
    make_module,
    refused,
)
from torch import nn  # noqa: E402

from coldrow.optim import RowwiseRMSpropAR, SparseOptimizer  # noqa: E402


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
