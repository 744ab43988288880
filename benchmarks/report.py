"""What is made of the timings: tables, ratios, the figures that coldrow is held to, and a plot."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contestants import BACKWARD, FLOOR, FLOOR_HUGE, FORWARD
from measuring import Timing
from workloads import POOLED, WORKLOADS

Medians = Mapping[tuple[str, int, str, str], float]
KINDS = ("touch", "read", "own")


def medians(timings: Sequence[Timing]) -> Medians:
    """Median milliseconds by workload, threads, contestant and phase."""
    return {(t.workload, t.threads, t.contestant, t.phase): t.median for t in timings}


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def ratios(
    by: Medians, workloads: Sequence[str], threads: int, phase: str, above: str, below: str
) -> dict[str, float]:
    """Median of ``above`` over median of ``below``, for the workloads that have both."""
    found = {}
    for name in workloads:
        keys = [(name, threads, contestant, phase) for contestant in (above, below)]
        if all(key in by for key in keys):
            found[name] = by[keys[0]] / by[keys[1]]
    return found


def not_more_processors(timings: Sequence[Timing]) -> list[tuple[str, int]]:
    """Workloads and numbers of threads at which the floor's update is hardly faster than on one thread.

    Its work is divided evenly and it only waits for memory, so then there was no other processor: on a
    virtual machine the host may have one core for two for as long as a process lives.
    """
    by = medians(timings)
    alone = []
    for (name, threads, contestant, phase), took in by.items():
        one = by.get((name, 1, contestant, phase))
        if (contestant, phase) == (FLOOR, "update") and threads > 1 and one and one < 1.2 * took:
            alone.append((name, threads))
    return alone


def show(timings: Sequence[Timing]) -> None:
    """Print the table of one workload and number of threads."""
    work, threads = WORKLOADS[timings[0].workload], timings[0].threads
    cells = {(timing.contestant, timing.phase): timing for timing in timings}
    columns = (FORWARD, BACKWARD)
    print(f"\n{work}; {work.ids:,} ids; {threads} thread{'s' * (threads > 1)}")
    print(f"{'ms: median [quartiles], x floor':32}" + "".join(f"{c:>34}" for c in columns))
    for name in dict.fromkeys(timing.contestant for timing in timings):
        line = f"{name:32}"
        for phase in columns:
            timing = cells[name, phase]
            low, high = timing.quartiles
            base = cells.get((FLOOR, phase))
            ratio = f"{timing.median / base.median:6.2f}x" if base else "      -"
            spread = f"[{low:.2f}-{high:.2f}]"
            line += f"{timing.median:10.3f} {spread:>15} {ratio}"
        print(line)
    for name in (FLOOR, FLOOR_HUGE):
        if (name, "sort") in cells:
            sort, update = cells[name, "sort"].median, cells[name, "update"].median
            print(f"  {name}: sort {sort:.3f} + update {update:.3f}")
    print(flush=True)


def comparisons() -> list[tuple[str, str]]:
    """Contestants whose ratios are printed per workload: above, below."""
    pairs = []
    for dtype, peer in itertools.product(("fp32", "fp16"), ("FBGEMM AR", "FBGEMM Adagrad")):
        pairs += [(f"{peer} {dtype}", f"coldrow {kind} {dtype}") for kind in KINDS]
    pairs += [(f"torch {o} fp32", "coldrow touch fp32") for o in ("Adagrad", "SparseAdam")]
    pairs += [(f"coldrow {kind} fp32", FLOOR) for kind in KINDS]
    pairs += [("coldrow touch fp32", FLOOR_HUGE)]
    pairs += [(f"coldrow {kind} fp32", "coldrow touch fp32") for kind in ("read", "own")]
    pairs += [("coldrow touch fp32", f"coldrow touch {dtype}") for dtype in ("fp16", "bf16")]
    pairs += [("FBGEMM AR fp32", "FBGEMM Adagrad fp32"), ("FBGEMM AR fp32", FLOOR)]
    return [*pairs, ("FBGEMM Adagrad fp32", FLOOR), (FLOOR_HUGE, FLOOR)]


def show_ratios(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Ratios of medians per workload, and their geometric mean over the pooled ones, with them."""
    by = medians(timings)
    names = list(dict.fromkeys(timing.workload for timing in timings))
    rows = []
    for threads in dict.fromkeys(timing.threads for timing in timings):
        header = "".join(f"{name:>9}" for name in [*names, "geomean"])
        print(f"\nratios of medians, {threads} thread{'s' * (threads > 1)}\n{'':58}{header}")
        for phase, (above, below) in itertools.product((FORWARD, BACKWARD), comparisons()):
            found = ratios(by, names, threads, phase, above, below)
            pooled = [found[name] for name in found if name in POOLED]
            if not found:
                continue
            mean = geometric_mean(pooled) if pooled else None
            cells = [f"{found[n]:9.2f}" if n in found else f"{'-':>9}" for n in names]
            last = f"{mean:9.2f}" if mean else f"{'-':>9}"
            print(f"{phase:16}{above + ' / ' + below:42}{''.join(cells)}{last}")
            rows.append(
                {"threads": threads, "phase": phase, "ratio": f"{above} / {below}", **found,
                 "geomean": mean}
            )  # fmt: skip
    return rows


# ------------------------------------------------------------------------- what it is held to


@dataclass(frozen=True)
class Figure:
    """One line of the summary: a ratio that is to be at least, or at most, ``target``.

    The geometric mean over the workloads is held against ``target`` and the worst of them against
    ``bound``. ``{}`` in a contestant's name is one of coldrow's kinds.
    """

    title: str
    above: str
    below: str
    phase: str
    target: float
    bound: float | None = None
    at_most: bool = False
    threads: int = 1
    workloads: tuple[str, ...] = POOLED
    kinds: tuple[str, ...] = KINDS

    def holds(self, value: float, limit: float | None) -> bool:
        if limit is None:
            return True
        return value <= limit if self.at_most else value >= limit

    def measured(self, by: Medians, kind: str) -> dict[str, float]:
        """The ratio by workload, of those that were run."""
        names = self.above.format(kind), self.below.format(kind)
        return ratios(by, self.workloads, self.threads, self.phase, *names)

    def limits(self) -> str:
        sign = "<=" if self.at_most else ">="
        bound = f" ({self.bound:g})" if self.bound is not None else ""
        return f"{sign} {self.target:g}{bound}"


OURS = "coldrow {} fp32"
FIGURES = (
    Figure("backward+update, FBGEMM AR", "FBGEMM AR fp32", OURS, BACKWARD, 4.5, 3.2),
    Figure("... with 2 threads each", "FBGEMM AR fp32", OURS, BACKWARD, 8, 5, threads=2),
    Figure("backward+update, FBGEMM JIT Adagrad", "FBGEMM Adagrad fp32", OURS, BACKWARD, 1.6, 1.3),
    Figure("... over floor + sort, 4K pages", OURS, FLOOR, BACKWARD, 1.2, 1.35, at_most=True),
    Figure("forward, FBGEMM JIT forward", "FBGEMM Adagrad fp32", OURS, FORWARD, 1.4, 1.1),
    Figure("fp16, backward+update, FBGEMM AR fp16", "FBGEMM AR fp16", "coldrow {} fp16",
           BACKWARD, 6, 4),
    Figure("bf16 to fp32, rows/s, backward+update", OURS, "coldrow {} bf16", BACKWARD, 1.5,
           workloads=("W1u", "W4")),
    Figure("bf16 to fp32, rows/s, forward", OURS, "coldrow {} bf16", FORWARD, 1.5,
           workloads=("W1u", "W4")),
    Figure("backward+update, torch Adagrad", "torch Adagrad fp32", OURS, BACKWARD, 20),
    Figure("backward+update, torch SparseAdam", "torch SparseAdam fp32", OURS, BACKWARD, 20),
    Figure("pooling none, backward+update, FBGEMM AR", "FBGEMM AR fp32", OURS, BACKWARD, 15,
           workloads=("W1z-none",)),
    Figure("charged on read over on touch, forward", OURS, "coldrow touch fp32", FORWARD, 1.25,
           1.35, at_most=True, kinds=("read", "own")),
)  # fmt: skip


def show_figures(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Print and return the figures with their targets: geometric mean, worst workload, verdict."""
    by = medians(timings)
    rows = []
    print("\nwhat it must show: geometric mean (worst workload); * where a target does not hold")
    print(f"{'':42}{'target (each)':>15}" + "".join(f"{'coldrow ' + k:>24}" for k in KINDS))
    for figure in FIGURES:
        cells = []
        for kind in KINDS:
            found = figure.measured(by, kind) if kind in figure.kinds else {}
            if not found:
                cells.append("-" if kind not in figure.kinds else "not measured")
                continue
            mean = geometric_mean(list(found.values()))
            choose: Callable[..., str] = max if figure.at_most else min
            worst = choose(found, key=lambda name, found=found: found[name])
            good = figure.holds(mean, figure.target)
            bounded = figure.holds(found[worst], figure.bound)
            missing = [name for name in figure.workloads if name not in found]
            cells.append(
                f"{mean:.2f}{'*' * (not good)} "
                f"({found[worst]:.2f}{'*' * (not bounded)} {worst}){'?' * bool(missing)}"
            )
            rows.append(
                {"figure": figure.title, "kind": kind, "geomean": mean, "target": figure.target,
                 "holds": good, "worst": found[worst], "worst_workload": worst,
                 "bound": figure.bound, "bound_holds": bounded, "at_most": figure.at_most,
                 "not_measured": missing}
            )  # fmt: skip
        print(f"{figure.title:42}{figure.limits():>15}" + "".join(f"{c:>24}" for c in cells))
    if any(row["not_measured"] for row in rows):
        print("? : not all of its workloads were run")
    return rows


# Microseconds per call of a module of one table, one bag, one id: cases of calls.py.
CALLS = (("coldrow: forward", 15.0), ("coldrow: forward + backward", 40.0))


def show_calls(took: Mapping[str, float]) -> list[dict[str, Any]]:
    """Print and return the overhead of small calls with its targets, from microseconds by name."""
    rows = []
    for name, target in CALLS:
        holds = took[name] <= target
        title = f"B=1, T=1, us: {name.removeprefix('coldrow: ')}"
        value = f"{took[name]:.1f}{'*' * (not holds)}"
        print(f"{title:42}{f'<= {target:g}':>15}{value:>24}")
        rows.append({"figure": title, "value": took[name], "target": target, "holds": holds})
    return rows


# ------------------------------------------------------------------------------------------ plot

COLOURS = {
    "coldrow touch fp32": "#1f77b4", "coldrow read fp32": "#6baed6", "coldrow own fp32": "#c6dbef",
    FLOOR_HUGE: "#7f7f7f", "FBGEMM Adagrad fp32": "#fdae6b", "FBGEMM AR fp32": "#e6550d",
    "torch Adagrad fp32": "#a1d99b", "torch SparseAdam fp32": "#31a354",
}  # fmt: skip


def plot(timings: Sequence[Timing], to: Path, title: str) -> None:
    """Bars of time over the floor's, fp32, per workload, phase and number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by = medians(timings)
    threads = list(dict.fromkeys(timing.threads for timing in timings))
    names = [name for name in POOLED if any(t.workload == name for t in timings)]
    figure, axes = pyplot.subplots(
        len(threads), 2, figsize=(13, 3.6 * len(threads)), squeeze=False, layout="constrained"
    )
    for (row, count), (column, phase) in itertools.product(
        enumerate(threads), enumerate((FORWARD, BACKWARD))
    ):
        axis = axes[row][column]
        for i, (contestant, colour) in enumerate(COLOURS.items()):
            found = ratios(by, names, count, phase, contestant, FLOOR)
            if not found:
                continue
            places = [names.index(name) + (i - len(COLOURS) / 2 + 0.5) * 0.1 for name in found]
            label = contestant if (row, column) == (0, 0) else None
            axis.bar(places, [v - 1 for v in found.values()], 0.1, 1, color=colour, label=label)
        axis.axhline(1, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}" if phase == FORWARD else "")
        axis.set_xticks(range(len(names)), names)
        axis.set_title(f"{phase}, {count} thread{'s' * (count > 1)}", fontsize=10)
        axis.set_ylabel("time over the floor's")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    pyplot.close(figure)
