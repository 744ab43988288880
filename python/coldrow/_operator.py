"""``torch.ops.coldrow.apply_``, which :func:`coldrow.apply_` becomes while it is traced::

    apply_(weight!, grad, indices, prev_iter!, state!, step, lr, epoch_start, spec)

``spec`` is text that says all that is not a tensor: policies and options. ``step``, ``epoch_start`` (int64) and
``lr`` (float64) are 0-dim tensors read when the operator runs, so that changing them compiles nothing anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from coldrow._backends.registry import TORCH_TYPES
from coldrow._steps import apply_now
from coldrow.policies import RowUpdate

_F = TypeVar("_F", bound=Callable[..., Any])
_register_fake: Callable[[str], Callable[[_F], _F]] = torch.library.register_fake

torch.library.define(
    "coldrow::apply_",
    "(Tensor(a!) weight, Tensor grad, Tensor indices, Tensor(b!) prev_iter, Tensor(c!)[] state, "
    "Tensor step, Tensor lr, Tensor epoch_start, str spec) -> ()",
)


@torch.library.impl("coldrow::apply_", TORCH_TYPES)
def _apply(
    weight: Tensor,
    grad: Tensor,
    indices: Tensor,
    prev_iter: Tensor,
    state: Sequence[Tensor],
    step: Tensor,
    lr: Tensor,
    epoch_start: Tensor,
    spec: str,
) -> None:
    options = json.loads(spec)
    update = RowUpdate.from_dict(options.pop("update"))
    names = update.state_names
    with torch.no_grad():
        apply_now(
            update,
            weight,
            grad,
            indices,
            dict(zip(names, (prev_iter, *state), strict=True)),
            step=int(step),
            lr=float(lr),
            epoch_start=int(epoch_start),
            **options,
        )


@_register_fake("coldrow::apply_")
def _apply_fake(*args: Any) -> None:
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def apply_spec(update: RowUpdate, *options: Any) -> str:
    """Return the spec of an update with on_nonfinite, table, row_offset and col_offset."""
    names = ("on_nonfinite", "table", "row_offset", "col_offset")
    return json.dumps({"update": update.to_dict(), **dict(zip(names, options, strict=True))})


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _optimizer_state(update: RowUpdate) -> tuple[str, ...]:
    return update.state_names[1:]


def traced_apply(
    update: RowUpdate,
    weight: Tensor,
    grad: Tensor,
    indices: Tensor,
    state: Mapping[str, Any],
    *,
    step: Any,
    lr: Any,
    epoch_start: Any,
    on_nonfinite: str,
    table: int | str,
    row_offset: int,
    col_offset: int,
) -> None:
    """Call ``torch.ops.coldrow.apply_`` with what :func:`coldrow.apply_` was given."""
    torch.ops.coldrow.apply_(
        weight,
        grad,
        indices,
        state["prev_iter"],
        [state[n] for n in _optimizer_state(update)],
        torch.as_tensor(step, dtype=torch.int64),
        torch.as_tensor(update.optimizer.lr if lr is None else lr, dtype=torch.float64),
        torch.as_tensor(0 if epoch_start is None else epoch_start, dtype=torch.int64),
        apply_spec(update, on_nonfinite, table, row_offset, col_offset),
    )
