"""One optimizer step on arrays, eagerly: what apply_, the optimizers and the operator all run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coldrow import _core
from coldrow._backends.host import HOST
from coldrow._backends.protocol import Backend, RowStep
from coldrow._backends.registry import backend_of
from coldrow._checks import (
    LAST_STEP,
    ON_NONFINITE,
    integer,
    number,
    one_of,
    plain_array,
    table_key,
    torch_of,
)
from coldrow.policies import RowUpdate, compiled


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
    arrays = [plain_array(n, state[n], written=True) for n in names if n != "prev_iter"]
    return arrays, plain_array("prev_iter", state["prev_iter"], written=True)


def require_update(update: Any) -> RowUpdate:
    """Return ``update``, or raise unless it is a RowUpdate."""
    if not isinstance(update, RowUpdate):
        raise TypeError(f"update: got {update!r}, accepted: a coldrow.RowUpdate")
    return update


def epoch_of(epoch_start: Any, step: int) -> int:
    """Return the first step of the running epoch, 0 where none began, or raise unless it is reached."""
    return 0 if epoch_start is None else integer("epoch_start", epoch_start, 0, step)


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
    """Do what :func:`coldrow.apply_` says."""
    arrays, prev_iter = _state_arrays(require_update(update), state)
    step = integer("step", step, 1, LAST_STEP)
    backend_of("weight", weight).apply(
        [
            RowStep(
                update,
                plain_array("weight", weight, written=True),
                plain_array("grad", grad, written=False),
                plain_array("indices", indices, written=False),
                arrays,
                prev_iter,
                number("lr", update.optimizer.lr if lr is None else lr),
                table_key(table),
                integer("row_offset", row_offset, 0, 2**62),
                integer("col_offset", col_offset, 0, 2**31),
            )
        ],
        step=step,
        epoch_start=epoch_of(epoch_start, step),
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

    One native call where all is in the memory of the processor, so that Ctrl-C comes before all of it or
    after. Sets ``clock`` (0-dim int64) to ``step`` and adds the number of rows skipped as non-finite to ``nonfinite``;
    returns it.
    """
    parts: dict[tuple[Backend, int], list[RowStep]] = {}
    for s in steps:
        backend = backend_of("weight", s.weight)
        parts.setdefault((backend, backend.number(s.weight)), []).append(s)
    if all(backend is HOST for backend, _ in parts):
        skipped: int = _core.apply_steps(
            [
                (
                    compiled(s.update),
                    s.weight,
                    s.grad,
                    s.indices,
                    s.state,
                    s.prev_iter,
                    s.lr,
                    s.key,
                    s.row_offset,
                    s.col_offset,
                )
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
            backend.apply(
                some,
                step=step,
                epoch_start=epoch_start,
                on_nonfinite=mode,
                check_step=False,
                check_only=check_only,
            )
            for (backend, _), some in parts.items()
        )

    run(on_nonfinite, True)
    skipped = run("skip" if on_nonfinite == "raise" else on_nonfinite, False)
    clock.fill_(step)
    if nonfinite is not None:
        nonfinite.add_(skipped)
    return skipped
