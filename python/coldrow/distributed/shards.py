"""The tables of one rank, and what follows from them and from what other ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from coldrow._backends.protocol import Moment
from coldrow.distributed.exchange import Ranks, hash64
from coldrow.distributed.gradients import first_step
from coldrow.distributed.request import Placement, Plan
from coldrow.nn.table import Table
from coldrow.nn.table_batch import Layout, TableBatch, TableLayout
from coldrow.policies import SGD, RowUpdate


class Shards:
    """What follows from the tables of one rank and from what other ranks have.

    Args:
        tables: the rows of this rank.
        described: the tables, for those that have an update of their own.
        whole: rows of each whole table.
        ranks: all of them.
    """

    def __init__(
        self, tables: TableBatch, described: Sequence[Table], whole: Sequence[int], ranks: Ranks
    ) -> None:
        self.tables = tables
        layout, kernels = tables.layout, tables.kernels
        dtypes = [w.dtype for w in tables.weights]
        own = [t.update for t in described]
        self.placement = placement = Placement(layout, whole, dtypes, own, ranks.world, ranks.rank)
        # What the owner of rows does with gradients that came: they are scaled and pooled already.
        one = torch.ones((), dtype=torch.float64)
        counters = replace(tables.counters, grad_scale=one)

        def of_owner(features: Sequence[int]) -> TableBatch:
            changed = replace(layout, features=tuple(features), pooling="sum")
            state = tables.state_by_table
            return TableBatch(changed, kernels, tables.weights, state, counters)

        self.served = of_owner(layout.features)
        self.served_by_row = of_owner(range(len(layout.tables)))

        # Rows on loan from their owners: those of a group are one table.
        firsts = [layout.tables[group.tables[0]] for group in placement.groups]
        groups = tuple(
            TableLayout(f"group {g}", t.dim, t.update, t.group) for g, t in enumerate(firsts)
        )
        features = tuple([placement.group_of[t] for t in layout.features])
        loan = replace(layout, tables=groups, features=features)
        loan_counters = replace(tables.counters, groups=loan.groups)
        self._loan = TableBatch(loan, kernels, [], [], loan_counters)
        sums = tuple([replace(t, update=RowUpdate(SGD(lr=1.0)), group=0) for t in groups])
        summing = replace(loan, tables=sums, charge="touch", on_nonfinite="propagate")
        self.summing = TableBatch(summing, kernels, [], [], first_step(summing))
        #: Differs where the policies or options of ranks do.
        self.agreed = hash64(replace(layout, tables=_without_origin(layout)).spec(None))

    def borrowed(self, plan: Plan) -> TableBatch:
        """Return the rows that came for a batch as tables, one per group of tables."""
        loan = self._loan
        return loan.over(plan.rows, [[p] for p in plan.prev_iters], loan.counters)

    def moment(self, sizes: tuple[int, ...] | None) -> Moment:
        """Return what a lookup in borrowed rows needs to know, now."""
        at = self._loan.counters
        return Moment(sizes, int(at.clock) + 1, int(at.epoch_start), at.lr_values())


def _without_origin(layout: Layout) -> tuple[TableLayout, ...]:
    return tuple([replace(t, origin=None) for t in layout.tables])
