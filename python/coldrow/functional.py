"""One step on one table, in place, on any array: torch, NumPy, CuPy or other DLPack.

Nothing here imports torch. All arguments are checked before anything is written: bad input raises one
exception that names the argument, what was given and what is accepted. On a CUDA device these calls run on
the current stream of the array's library and wait for what they find.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from coldrow import _core
from coldrow._engines import HOST, Engine, RowStep, engine_of, torch_of
from coldrow.policies import (
    LinearClipped,
    Nearest,
    Rounding,
    RowUpdate,
    RowwiseRMSprop,
    compiled,
    item,
    number,
)

__all__ = ["apply_", "init_state", "read_", "rowwise_rmsprop_ar_", "table_key"]

LAST_STEP = 2**31 - 1
MAX_DIM = 2**30
MAX_ELEMENTS = 2**60  # of a table: beyond them bytes do not count in 64 bits
ON_NONFINITE = ("skip", "raise", "propagate")


def table_key(table: int | str) -> int:
    """Return the 64-bit key of a table for stochastic rounding: a name is hashed, a number kept."""
    if isinstance(table, str):
        return int.from_bytes(hashlib.blake2b(table.encode(), digest_size=8).digest(), "little")
    return integer("table", table, 0, 2**64 - 1)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` as an int in [low, high], or raise naming the argument."""

    def error() -> str:  # (A tensor's text takes longer than a step.)
        return f"{name}: got {value!r}, accepted: an integer from {low} to {high}"

    try:
        given = item(value)
        if isinstance(given, bool):
            raise TypeError(error())
        whole = given.__index__()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise TypeError(error()) from None
    if not low <= whole <= high:
        raise ValueError(error())
    return int(whole)


def one_of(name: str, given: Any, accepted: Sequence[Any]) -> Any:
    """Return ``given``, or raise unless it is among ``accepted``."""
    # (By type first: an array would compare element by element.)
    if not any(isinstance(given, type(a)) and given == a for a in accepted):
        raise ValueError(f"{name}: got {given!r}, accepted: {', '.join(map(repr, accepted))}")
    return given


def listed(name: str, given: Any, accepted: str) -> list[Any]:
    """Return the items of ``given``, or raise where it has none."""
    try:
        return list(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {given!r}, accepted: {accepted}") from None


def require_dense(name: str, tensor: Any) -> None:
    """Refuse a torch tensor that is no array: sparse, nested, of another library's layout."""
    if tensor.layout != sys.modules["torch"].strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: got a tensor of layout {layout}, accepted: a dense tensor")


def _checked(name: str, array: Any, *, written: bool) -> Any:
    """Refuse the torch tensors whose memory does not mean what it seems to."""
    torch = torch_of(array)
    if torch is None:
        return array
    require_dense(name, array)
    if type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name}: got a {type(array).__name__} (a tensor subclass with its own dispatch), "
            "accepted: a plain tensor"
        )
    if array.is_neg() or array.is_conj():
        raise ValueError(
            f"{name}: is a lazily negated or conjugated view, accepted: a plain tensor "
            "(call .resolve_neg() / .resolve_conj())"
        )
    if array.numel() > 0:
        last = sum((n - 1) * s for n, s in zip(array.shape, array.stride(), strict=True))
        end = (array.storage_offset() + last + 1) * array.element_size()
        if (
            0 < array.untyped_storage().nbytes() < end
        ):  # one of none has no address, see take_array()
            raise ValueError(
                f"{name}: its storage has {array.untyped_storage().nbytes()} bytes, too few for "
                f"{list(array.shape)}, accepted: a tensor whose storage was not freed or resized"
            )
    if written and array.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad and would be changed behind autograd's back, accepted: a tensor "
            "that does not (pass .detach(), or call under torch.no_grad())"
        )
    return array.detach() if array.requires_grad else array


def bump_versions(*arrays: Any) -> None:
    """Tell autograd that these tensors changed."""
    for array in arrays:
        torch = torch_of(array)
        if torch is not None and not array.is_inference():
            torch.autograd.graph.increment_version(array)


def _state_arrays(update: RowUpdate, state: Mapping[str, Any]) -> tuple[list[Any], Any]:
    names = update.state_names
    if not isinstance(state, Mapping) or set(state) != set(names):
        given = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state: got {given}, accepted: a dict with {sorted(names)}")
    arrays = [_checked(n, state[n], written=True) for n in names if n != "prev_iter"]
    return arrays, _checked("prev_iter", state["prev_iter"], written=True)


def _check_update(update: Any) -> RowUpdate:
    if not isinstance(update, RowUpdate):
        raise TypeError(f"update: got {update!r}, accepted: a coldrow.RowUpdate")
    return update


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
        epoch_start: the first step of the running epoch, for epoch-aware decays; default: none began.
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
        from coldrow.nn.ops import traced_apply as apply
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


def apply_now(
    update: RowUpdate,
    weight: Any,
    grad: Any,
    indices: Any,
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
    """Do what :func:`apply_` says."""
    arrays, prev_iter = _state_arrays(_check_update(update), state)
    engine_of("weight", weight).apply(
        [
            RowStep(
                update,
                _checked("weight", weight, written=True),
                _checked("grad", grad, written=False),
                _checked("indices", indices, written=False),
                arrays,
                prev_iter,
                number("lr", update.optimizer.lr if lr is None else lr),
                table_key(table),
                integer("row_offset", row_offset, 0, 2**62),
                integer("col_offset", col_offset, 0, 2**31),
            )
        ],
        step=integer("step", step, 1, LAST_STEP),
        epoch_start=integer("epoch_start", 0 if epoch_start is None else epoch_start, 0, LAST_STEP),
        on_nonfinite=one_of("on_nonfinite", on_nonfinite, ON_NONFINITE),
        check_step=True,
        check_only=False,
    )
    bump_versions(weight, *state.values())


def sparse_rows(grad: Any, name: str, accepted: str) -> tuple[Any, Any] | None:
    """Return (values, indices) of a torch sparse gradient, None if it has none, or raise."""
    if grad is None or (grad.is_sparse and grad._nnz() == 0):
        return None
    if not grad.is_sparse or grad.sparse_dim() != 1:
        raise TypeError(f"{name}: got layout {grad.layout}, accepted: {accepted}")
    return grad._values().contiguous(), grad._indices()[0].contiguous()


def apply_steps(
    steps: Sequence[RowStep],
    *,
    step: int,
    epoch_start: int,
    on_nonfinite: str,
    clock: Any,
    nonfinite: Any = None,
) -> int:
    """Apply all parts of an optimizer step, or raise before the first is written.

    One native call where all is in the processor's memory, so that Ctrl-C comes before all of it or after. Sets ``clock`` (0-dim int64) to ``step``
    and adds the number of rows skipped as non-finite to ``nonfinite``; returns it.
    """
    parts: dict[tuple[Engine, int], list[RowStep]] = {}
    for s in steps:
        engine = engine_of("weight", s.weight)
        parts.setdefault((engine, engine.number(s.weight)), []).append(s)
    if all(engine is HOST for engine, _ in parts):
        skipped: int = _core.apply_steps(
            [
                (compiled(s.update), s.weight, s.grad, s.indices, s.state, s.prev_iter, s.lr, s.key)
                for s in steps
            ],
            step,
            epoch_start,
            on_nonfinite,
            clock,
            nonfinite,
        )
        return skipped

    def run(mode: str, check_only: bool) -> int:
        return sum(
            engine.apply(
                some,
                step=step,
                epoch_start=epoch_start,
                on_nonfinite=mode,
                check_step=False,
                check_only=check_only,
            )
            for (engine, _), some in parts.items()
        )

    run(on_nonfinite, True)
    skipped = run("skip" if on_nonfinite == "raise" else on_nonfinite, False)
    clock.fill_(step)
    if nonfinite is not None:
        nonfinite.add_(skipped)
    return skipped


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
    engine_of("weight", weight).read(
        _check_update(update),
        _checked("out", out, written=True),
        _checked("weight", weight, written=False),
        _checked("indices", indices, written=False),
        _checked("prev_iter", state["prev_iter"], written=False),
        step=integer("step", step, 1, LAST_STEP + 1),
        lr=number("lr", update.optimizer.lr if lr is None else lr),
        epoch_start=integer("epoch_start", 0 if epoch_start is None else epoch_start, 0, LAST_STEP),
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
    shapes = _check_update(update).state_shapes(num_rows, dim)
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
