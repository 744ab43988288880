"""State to and from FBGEMM: weights, optimizer states and the clock.

FBGEMM keeps ``prev_iter`` in float32, which cannot hold every step above 2**24. On the way in it becomes
int32, and a value that float32 rounded above the clock becomes the clock. On the way out it is rounded to
float32 as FBGEMM would have.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coldrow import policies
from coldrow._checks import LAST_STEP
from coldrow.compat.fbgemm.definitions import EmbeddingLocation
from coldrow.nn import TableBatchedEmbeddingBags

_SUM = ("momentum1", "sum")
_MOMENTS = (("momentum1", "exp_avg"), ("momentum2", "exp_avg_sq"))
_TOUCHES = ("touches", "row_counter")
# coldrow's and torch's name of each array, in the order of FBGEMM's split_optimizer_states().
_ARRAYS: dict[type[policies.Optimizer], tuple[tuple[str, str], ...]] = {
    policies.SGD: (),
    policies.RowwiseRMSprop: (_SUM, ("prev_iter", "prev_iter")),
    policies.RowwiseAdagrad: (_SUM,),
    policies.Adagrad: (_SUM,),
    policies.Adam: _MOMENTS,
    policies.PartialRowwiseAdam: _MOMENTS,
}


class HoldsTables(Protocol):
    """A module whose tables are coldrow's, in ``emb``: ``SplitTableBatchedEmbeddingBagsCodegen``."""

    @property
    def emb(self) -> TableBatchedEmbeddingBags:
        """The tables."""


@dataclass(frozen=True)
class FbgemmState:
    """What FBGEMM's module holds, one entry per table.

    Args:
        weights: ``[rows, dim]`` each, as ``split_embedding_weights()``.
        optimizer_states: as ``split_optimizer_states()``: for ROWWISE_RMSPROP_AR momentum1 and prev_iter,
            float32 ``[rows]``; empty for EXACT_SGD.
        iter: FBGEMM's clock: steps done (its forwards, where it counts them).
    """

    weights: Sequence[Tensor]
    optimizer_states: Sequence[Sequence[Tensor]]
    iter: int

    @classmethod
    def of(cls, tbe: Any) -> FbgemmState:
        """Return the state of an FBGEMM module: live views, nothing is copied."""
        return cls(tbe.split_embedding_weights(), tbe.split_optimizer_states(), int(tbe.iter))

    def write_to(self, tbe: Any) -> None:
        """Write it into an FBGEMM module of the same tables and optimizer.

        Raises:
            ValueError: numbers of tables or states, or shapes, that differ; nothing was written.
        """
        ours = [*self.weights, *(s for states in self.optimizer_states for s in states)]
        other = FbgemmState.of(tbe)
        theirs = [*other.weights, *(s for states in other.optimizer_states for s in states)]
        if [tuple(a.shape) for a in ours] != [tuple(a.shape) for a in theirs]:
            raise ValueError(
                f"tbe: has weights and states of shapes {[tuple(a.shape) for a in theirs]}, accepted: "
                f"{[tuple(a.shape) for a in ours]}"
            )
        with torch.no_grad():
            for target, source in zip(theirs, ours, strict=True):
                target.copy_(source)
            for name in ("iter", "iter_cpu"):  # FBGEMM has two copies of its clock
                if isinstance(getattr(tbe, name, None), Tensor):
                    getattr(tbe, name).fill_(self.iter)


def optimizer_arrays(emb: TableBatchedEmbeddingBags) -> tuple[tuple[str, str], ...]:
    """Return coldrow's and torch's names of the state arrays, in FBGEMM's order.

    Raises:
        ValueError: an optimizer that FBGEMM does not have.
    """
    optimizers = {
        type(t.update.optimizer if t.update else emb.update.optimizer) for t in emb.tables
    }
    kind = optimizers.pop()
    if optimizers or kind not in _ARRAYS:
        raise ValueError(
            f"emb: its tables' optimizers are {sorted(k.__name__ for k in {kind, *optimizers})}, "
            f"accepted: one of {', '.join(k.__name__ for k in _ARRAYS)} for all"
        )
    arrays = _ARRAYS[kind]
    if all("touches" in state for state in emb.state.values()):
        if kind is not policies.Adam:
            raise ValueError("emb: bias_correction='row', accepted: with Adam only, as in FBGEMM")
        arrays = (*arrays, _TOUCHES)
    return arrays


def _tables(emb: Any) -> TableBatchedEmbeddingBags:
    inner = getattr(emb, "emb", emb)
    if not isinstance(inner, TableBatchedEmbeddingBags):
        raise TypeError(
            f"emb: got {type(emb).__name__}, accepted: a coldrow.nn.TableBatchedEmbeddingBags or a "
            "coldrow.compat.fbgemm.SplitTableBatchedEmbeddingBagsCodegen"
        )
    return inner


def export_state(
    emb: TableBatchedEmbeddingBags | HoldsTables,
) -> FbgemmState:
    """Return a module's state as FBGEMM keeps it: copies, with ``prev_iter`` in float32.

    Above step 2**24 float32 rounds ``prev_iter`` to a multiple of 2, 4, ..., as in FBGEMM itself.

    Args:
        emb: any module with an optimizer that FBGEMM has.
    """
    emb = _tables(emb)
    arrays = optimizer_arrays(emb)
    states = [
        [state[name].to(torch.float32, copy=True).contiguous() for name, _ in arrays]
        for state in emb.state.values()
    ]
    return FbgemmState(
        [weight.detach().clone() for weight in emb.weights.values()],
        states if arrays else [],
        emb.clock,
    )


def import_state(
    emb: TableBatchedEmbeddingBags | HoldsTables,
    source: Any,
    *,
    prefix: str = "",
) -> None:
    """Load FBGEMM's weights, optimizer states and clock: all of it, or nothing.

    Learning rate and epochs stay the module's own (FBGEMM's checkpoints have no learning rate). Where
    FBGEMM keeps no ``prev_iter`` all rows count as never touched.

    Args:
        emb: the module to load into, of the same tables and optimizer.
        source: an :class:`FbgemmState`, FBGEMM's module, or its ``state_dict``.
        prefix: where in the ``state_dict`` the module's keys begin, e.g. ``"sparse."``.

    Raises:
        TypeError, ValueError, RuntimeError: what does not fit; nothing was written.
    """
    tables = _tables(emb)
    tables.load_state_dict(checkpoint_entries(tables, source, prefix))


def checkpoint_entries(
    emb: TableBatchedEmbeddingBags, source: Any, prefix: str = ""
) -> dict[str, Any]:
    """Return what ``emb.state_dict()`` would be with FBGEMM's state in place of its own."""
    if isinstance(source, Mapping):
        source = _from_state_dict(emb, source, prefix)
    elif not isinstance(source, FbgemmState):
        if not hasattr(source, "split_optimizer_states"):
            raise TypeError(
                f"source: got {type(source).__name__}, accepted: an FbgemmState, an FBGEMM module or "
                "its state_dict"
            )
        source = FbgemmState.of(source)
    clock = operator.index(source.iter)
    if not 0 <= clock <= LAST_STEP:
        raise ValueError(f"iter: got {clock}, accepted: 0 to 2**31 - 1")
    arrays = [name for name, _ in optimizer_arrays(emb)]
    names = [table.name for table in emb.tables]
    states = source.optimizer_states if arrays else [[] for _ in names]
    for what, given in (("weights", source.weights), ("optimizer_states", states)):
        if len(given) != len(names):
            raise ValueError(f"{what}: got {len(given)} tables, accepted: {len(names)}")
    # (Copies: what is loaded must not share memory with what it is loaded into.)
    entries: dict[str, Any] = {k: v.clone() for k, v in emb.state_dict().items()}
    entries["clock"] = torch.full_like(entries["clock"], clock)
    for name, weight, state in zip(names, source.weights, states, strict=True):
        if len(state) != len(arrays):
            raise ValueError(
                f"optimizer_states: got {len(state)} for table {name!r}, accepted: {', '.join(arrays)}"
            )
        entries[f"weights.{name}"] = weight.detach()
        entries[f"state.{name}.prev_iter"].zero_()
        for key, given in zip(arrays, state, strict=True):
            value = given.detach()
            value = _exact_prev_iter(value, clock, name) if key == "prev_iter" else value.float()
            entries[f"state.{name}.{key}"] = value
    return entries


def _exact_prev_iter(given: Tensor, clock: int, table: str) -> Tensor:
    """Return int32 ``prev_iter``; a float32 that was rounded to above the clock becomes the clock."""
    exact = given.double()
    highest = (
        float(torch.tensor(clock, dtype=torch.float32)) if given.is_floating_point() else clock
    )
    bad = ~((exact >= 0) & (exact <= highest) & (exact == exact.round()))
    if bool(bad.any()):
        raise ValueError(
            f"prev_iter: got {float(exact[bad][0])} in table {table!r}, accepted: whole numbers from 0 to "
            f"the clock (iter), {clock}"
        )
    return exact.clamp(max=clock).to(torch.int32)


def _from_state_dict(
    emb: TableBatchedEmbeddingBags, state_dict: Mapping[str, Any], prefix: str
) -> FbgemmState:
    """Cut the tables out of the flat tensors of FBGEMM's state_dict."""

    def entry(key: str) -> Tensor:
        value = state_dict.get(prefix + key)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{prefix}{key}: is missing, accepted: the state_dict of FBGEMM's "
                "SplitTableBatchedEmbeddingBagsCodegen with the module's optimizer"
            )
        return value

    # What is by feature there: take the first feature of each table.
    features_of = emb.table_batch.layout.features
    features = [features_of.index(t) for t in range(len(emb.tables))]
    rows = entry("rows_per_table").tolist()
    dims = entry("D_offsets").diff().tolist()
    shapes = [[t.num_rows, t.dim] for t in emb.tables]
    got = [[rows[f], dims[f]] for f in features if f < min(len(rows), len(dims))]
    if len(rows) != len(features_of) or got != shapes:
        raise ValueError(
            f"{prefix}rows_per_table, D_offsets: got tables of {got} by {len(rows)} features, accepted: "
            f"{shapes} by {len(features_of)}"
        )

    def tables(name: str) -> list[Tensor]:
        places, starts = entry(f"{name}_placements").tolist(), entry(f"{name}_offsets").tolist()
        out = []
        for f, table in zip(features, emb.tables, strict=True):
            place = {EmbeddingLocation.DEVICE: "dev", EmbeddingLocation.HOST: "host"}.get(
                places[f], "uvm"
            )
            by_element = name == "weights" or emb.state[table.name][_own(name)].dim() == 2
            shape = [table.num_rows, table.dim] if by_element else [table.num_rows]
            flat = entry(f"{name}_{place}").detach().reshape(-1)
            size = table.num_rows * (table.dim if by_element else 1)
            if starts[f] + size > flat.numel():
                raise ValueError(
                    f"{prefix}{name}_{place}: got {flat.numel()} numbers, accepted: {starts[f] + size} "
                    "at least"
                )
            out.append(flat[starts[f] : starts[f] + size].view(shape))
        return out

    states = [tables(_theirs(name)) for name, _ in optimizer_arrays(emb)]
    has_iter = isinstance(state_dict.get(prefix + "iter"), Tensor)
    if "prev_iter" in [name for name, _ in optimizer_arrays(emb)]:
        entry("iter")
    return FbgemmState(
        tables("weights"),
        [list(of_table) for of_table in zip(*states, strict=True)],
        int(state_dict[prefix + "iter"]) if has_iter else 0,
    )


def _theirs(name: str) -> str:
    return "row_counter" if name == "touches" else name


def _own(name: str) -> str:
    return "touches" if name == "row_counter" else name
