"""One step on one table, in place, on any array: torch, NumPy, CuPy or other DLPack.

Nothing here imports torch. All arguments are checked before anything is written: bad input raises one
exception that names the argument, what was given and what is accepted. On a CUDA device these calls run on
the current stream of the array's library and wait for what they find.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from coldrow._backends.registry import backend_of
from coldrow._checks import (
    LAST_STEP,
    MAX_DIM,
    MAX_ELEMENTS,
    integer,
    number,
    plain_array,
    table_key,
    torch_of,
)
from coldrow._steps import apply_now, bump_versions, epoch_of, require_update
from coldrow.policies import LinearClipped, Nearest, Rounding, RowUpdate, RowwiseRMSprop

__all__ = ["apply_", "init_state", "read_", "rowwise_rmsprop_ar_", "table_key"]


def apply_(
    update: RowUpdate,
    weight: Any,
    grad: Any,
    indices: Any,
    state: Mapping[str, Any],
    *,
    step: int,
    lr: float | None = None,
    epoch_start: int | None = None,
    on_nonfinite: str = "raise",
    table: int | str = 0,
    row_offset: int = 0,
    col_offset: int = 0,
) -> None:
    """Update the touched rows of one table in place.

    Gradients of duplicate indices are summed (float32, in order) and applied once.

    Args:
        update: what to apply.
        weight: float32, float16 or bfloat16 ``[E, D]``, contiguous, writable.
        grad: float32, float16 or bfloat16 ``[N, D]``, contiguous: one gradient row per index.
        indices: int32 or int64 ``[N]``, contiguous, each in ``[0, E)``.
        state: ``{"prev_iter": int32 [E], ...}`` with what the optimizer has: float32 ``[E]`` of any
            stride, or contiguous ``[E, D]`` where element-wise; zero to begin with (see
            :func:`init_state`).
        step: number of this optimizer step, counted from 1; greater than ``prev_iter`` of every row
            touched.
        lr: learning rate; default ``update.optimizer.lr``.
        epoch_start: the first step of the running epoch, at most ``step``, for epoch-aware decays; default:
            none began.
        on_nonfinite: for rows whose update would not be finite: ``"raise"`` (nothing is written),
            ``"skip"`` (those rows and their state stay as they are) or ``"propagate"``.
        table: name or key of the table, for stochastic rounding.
        row_offset: global row of local row 0, for stochastic rounding of a shard.
        col_offset: global column of local column 0, likewise.

    Raises:
        TypeError: an argument of a kind or dtype that is not accepted.
        ValueError: a shape, stride, device, overlap, hyper-parameter or step that is not accepted, or
            a non-finite update under ``"raise"``.
        IndexError: an index outside ``[0, E)``.
    """
    torch = torch_of(weight)
    if torch is not None and torch.compiler.is_compiling():
        from coldrow._operator import traced_apply as apply
    else:
        apply = apply_now
    apply(
        update,
        weight,
        grad,
        indices,
        state,
        step=step,
        lr=lr,
        epoch_start=epoch_start,
        on_nonfinite=on_nonfinite,
        table=table,
        row_offset=row_offset,
        col_offset=col_offset,
    )


def rowwise_rmsprop_ar_(
    weight: Any,
    grad: Any,
    indices: Any,
    momentum1: Any,
    prev_iter: Any,
    *,
    step: int,
    lr: float,
    eps: float = 1e-8,
    ema_beta: float = 0.99,
    ar_alpha: float = 0.0,
    min_shrinkage: float = 0.1,
    rounding: Rounding | None = None,
    on_nonfinite: str = "raise",
    table: int | str = 0,
    row_offset: int = 0,
    col_offset: int = 0,
) -> None:
    """Row-wise RMSprop with adaptive regularization, in place: :func:`apply_` spelled out.

    For each distinct row touched, with ``g`` the sum of its gradients and ``I = step - prev_iter``
    (1 on the first touch)::

        momentum1 = ema_beta * momentum1 + (1 - ema_beta) * mean(g**2)
        weight    = max(min_shrinkage, 1 - min(1, lr*ar_alpha*I)) * weight
                    - lr / (sqrt(momentum1) + eps) * g
        prev_iter = step

    Source: Li & Lyu, "Adaptive Regularization" (ICLR 2026), as FBGEMM's ROWWISE_RMSPROP_AR.

    Args:
        weight: float32, float16 or bfloat16 ``[E, D]``.
        grad: float32, float16 or bfloat16 ``[N, D]``.
        indices: int32 or int64 ``[N]``.
        momentum1: float32 ``[E]``, any stride.
        prev_iter: int32 ``[E]``, any stride; 0 for rows never touched.
        step: number of this optimizer step, from 1.
        lr: learning rate, >= 0.
        eps: >= 0.
        ema_beta: in [0, 1].
        ar_alpha: >= 0; 0 is plain row-wise RMSprop, bit for bit.
        min_shrinkage: in [0, 1].
        rounding: default :class:`coldrow.Nearest`.
        on_nonfinite: as for :func:`apply_`.
        table: as for :func:`apply_`.
        row_offset: as for :func:`apply_`.
        col_offset: as for :func:`apply_`.

    Raises:
        TypeError, ValueError, IndexError: as for :func:`apply_`.
    """
    update = RowUpdate(
        RowwiseRMSprop(lr=lr, eps=eps, ema_beta=ema_beta),
        LinearClipped(alpha=number("ar_alpha", ar_alpha), min_shrinkage=min_shrinkage),
        Nearest() if rounding is None else rounding,
    )
    apply_(
        update,
        weight,
        grad,
        indices,
        {"momentum1": momentum1, "prev_iter": prev_iter},
        step=step,
        on_nonfinite=on_nonfinite,
        table=table,
        row_offset=row_offset,
        col_offset=col_offset,
    )


def read_(
    out: Any,
    update: RowUpdate,
    weight: Any,
    indices: Any,
    state: Mapping[str, Any],
    *,
    step: int,
    lr: float | None = None,
    epoch_start: int | None = None,
) -> None:
    """Write rows as a read-charged forward before ``step`` sees them: ``decay(I-1, lr) * weight``.

    Changes nothing but ``out``. Rows never touched read as stored.

    Args:
        out: float32, float16 or bfloat16 ``[N, D]``, contiguous, writable.
        update: its decay is what is charged.
        weight: float32, float16 or bfloat16 ``[E, D]``, contiguous.
        indices: int32 or int64 ``[N]``, each in ``[0, E)``.
        state: as for :func:`apply_`; only ``prev_iter`` is read.
        step: the step that the read precedes (clock + 1).
        lr: default ``update.optimizer.lr``.
        epoch_start: as for :func:`apply_`.

    Raises:
        TypeError, ValueError, IndexError: as for :func:`apply_`.
    """
    if not isinstance(state, Mapping) or "prev_iter" not in state:
        raise ValueError("state: got no prev_iter, accepted: a dict with 'prev_iter'")
    step = integer("step", step, 1, LAST_STEP + 1)
    backend_of("weight", weight).read(
        require_update(update),
        plain_array("out", out, written=True),
        plain_array("weight", weight, written=False),
        plain_array("indices", indices, written=False),
        plain_array("prev_iter", state["prev_iter"], written=False),
        step=step,
        lr=number("lr", update.optimizer.lr if lr is None else lr),
        epoch_start=epoch_of(epoch_start, step),
    )
    bump_versions(out)


def init_state(update: RowUpdate, num_rows: int, dim: int, like: Any) -> dict[str, Any]:
    """Return the state of a table never trained: zeros, of the array library and device of ``like``.

    Args:
        update: what will be applied.
        num_rows: rows of the table.
        dim: columns of the table, the width of element-wise state.
        like: a torch, NumPy or CuPy array.

    Returns:
        ``{"prev_iter": int32 [num_rows], ...}`` with the optimizer's state, float32 ``[num_rows]``, or
        ``[num_rows, dim]`` where element-wise: ``momentum1`` for RowwiseRMSprop.
    """
    dim = integer("dim", dim, 1, MAX_DIM)
    num_rows = integer("num_rows", num_rows, 0, MAX_ELEMENTS // dim)
    shapes = require_update(update).state_shapes(num_rows, dim)
    torch = torch_of(like)
    if torch is not None:
        return {
            name: torch.zeros(
                shape,
                dtype=torch.int32 if name == "prev_iter" else torch.float32,
                device=like.device,
            )
            for name, shape in shapes.items()
        }
    library = sys.modules.get(type(like).__module__.partition(".")[0])
    is_array = hasattr(like, "dtype") and hasattr(like, "shape")
    if not is_array or library is None or not hasattr(library, "zeros"):
        raise TypeError(f"like: got {type(like).__name__}, accepted: a torch, NumPy or CuPy array")
    return {
        name: library.zeros(shape, dtype="int32" if name == "prev_iter" else "float32")
        for name, shape in shapes.items()
    }
