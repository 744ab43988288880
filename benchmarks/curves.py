"""Time of a step and memory over the rows of a table, and over the indices of a batch.

    python benchmarks/curves.py [--max-rows 1e8] [--json curves.json] [--plot curves.svg]

One bfloat16 table of D=32, row-wise RMSprop with CumulativeLinear charged on read, one thread. All
tables of a curve live at once and take their steps in turn; the caches are emptied before each. The
rows' curve takes 8 GB of memory (1e8 rows), the other 1 GB.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from contestants import huge_page_bytes
from measuring import Evictor, environment
from torch import Tensor

import coldrow
from coldrow.nn import Table, TableBatchedEmbeddingBags

HERE = Path(__file__).resolve().parent
DIM, BAG = 32, 10
ROWS = (100_000, 1_000_000, 10_000_000, 100_000_000)  # with INDICES_OF_ROWS ids
INDICES_OF_ROWS = 100_000
INDICES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)  # into ROWS_OF_INDICES rows
ROWS_OF_INDICES = 10_000_000
DRAWS = ("uniform", "Zipf 1.05")


def resident_bytes() -> int:
    """Memory of this process that is there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def filled(weight: Tensor) -> None:
    """Fill a table with a block of random rows over and over: drawing 1e8 rows takes minutes."""
    block = torch.empty(min(len(weight), 100_000), DIM).uniform_(-0.1, 0.1).to(weight.dtype)
    for part in weight.split(len(block)):
        part.copy_(block[: len(part)])


def table_of(rows: int) -> tuple[TableBatchedEmbeddingBags, dict[str, int]]:
    """A module of one table, every page of it written, and what it takes."""
    gc.collect()
    resident, huge = resident_bytes(), huge_page_bytes()
    update = coldrow.RowUpdate(
        coldrow.RowwiseRMSprop(lr=0.01), coldrow.CumulativeLinear(half_life=1000.0)
    )
    emb = TableBatchedEmbeddingBags(
        [Table("t", rows, DIM, dtype=torch.bfloat16, features=["f"], init=filled)],
        update,
        charge="read",
    )
    for state in emb.state["t"].values():  # zeroed memory is not there until it is written
        state.fill_(0)
    return emb, {
        "weight_bytes": emb.weights["t"].nbytes,
        "state_bytes": sum(state.nbytes for state in emb.state["t"].values()),
        "resident_bytes": resident_bytes() - resident,
        "huge_page_bytes": huge_page_bytes() - huge,
    }


def ids(rows: int, count: int, draw: str, generator: torch.Generator) -> Tensor:
    """Draw ids; Zipf's by its continuous inverse, then scattered over the table."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if draw == "uniform":
        return (u * rows).long().clamp_(max=rows - 1)
    exponent = 1.0 - 1.05
    rank = ((u * (rows**exponent - 1.0) + 1.0) ** (1.0 / exponent)).long().clamp_(1, rows) - 1
    factor = 2_654_435_761  # a prime, which divides no number of rows here: ranks stay distinct
    return rank * factor % rows


def batches(rows: int, count: int, draw: str, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Draw ids, offsets and gradient of some batches."""
    generator = torch.Generator().manual_seed(rows + count)
    bags = count // BAG
    offsets = torch.arange(0, count + 1, BAG)
    grad = torch.randn(bags, DIM, generator=generator)
    return [(ids(rows, count, draw, generator), offsets, grad) for _ in range(number)]


Point = dict[str, Any]


def measure(
    cases: list[tuple[Point, TableBatchedEmbeddingBags, int, int]],
    repeats: int,
    threads: int,
    evict: Evictor,
) -> list[Point]:
    """Time one step of each case (what it is, module, rows, indices) per round."""
    torch.set_num_threads(threads)
    drawn = [batches(rows, count, point["draw"], 3) for point, _, rows, count in cases]
    samples = [([], []) for _ in cases]  # type: list[tuple[list[float], list[float]]]
    gc.collect()
    gc.disable()
    for round_ in range(-len(drawn[0]), repeats):  # every batch once before it is timed
        for case, made, took in zip(cases, drawn, samples, strict=True):
            indices, offsets, grad = made[round_ % len(made)]
            evict()
            begin = time.perf_counter_ns()
            out = case[1](indices, offsets)
            between = time.perf_counter_ns()
            out.backward(grad)
            end = time.perf_counter_ns()
            if round_ >= 0:
                took[0].append((between - begin) * 1e-6)
                took[1].append((end - between) * 1e-6)
            del out  # here, and not within the next step's time
    gc.enable()
    points = []
    for (point, _, rows, count), took in zip(cases, samples, strict=True):
        quartiles = [statistics.quantiles(t, n=4, method="inclusive") for t in took]
        points.append(
            {
                "rows": rows,
                "indices": count,
                **point,
                "forward_ms": quartiles[0][1],
                "forward_quartiles": quartiles[0][::2],
                "backward_ms": quartiles[1][1],
                "backward_quartiles": quartiles[1][::2],
                "ns_per_index": (quartiles[0][1] + quartiles[1][1]) * 1e6 / count,
            }
        )
    return points


def show(title: str, points: list[Point]) -> None:
    """Print a curve."""
    print(f"\n{title}")
    print(f"{'rows':>12}{'indices':>12}  {'ids':10}{'forward ms':>28}{'backward+update ms':>28}"
          f"{'ns/index':>10}{'memory MB':>11}{'in 2M pages':>12}")  # fmt: skip
    for p in points:
        cells = [
            f"{p[k + '_ms']:10.3f} [{p[k + '_quartiles'][0]:.3f}-{p[k + '_quartiles'][1]:.3f}]"
            for k in ("forward", "backward")
        ]
        print(f"{p['rows']:12,}{p['indices']:12,}  {p['draw']:10}{cells[0]:>28}{cells[1]:>28}"
              f"{p['ns_per_index']:10.1f}{p['resident_bytes'] / 1e6:11,.0f}"
              f"{p['huge_page_bytes'] / p['resident_bytes']:12.0%}")  # fmt: skip


def exponents(points: list[Point], key: str) -> list[float]:
    """k of time ~ key^k, from each point to the next: 0 is flat, 1 is linear."""
    times = [p["forward_ms"] + p["backward_ms"] for p in points]
    return [
        math.log(times[i + 1] / times[i]) / math.log(points[i + 1][key] / points[i][key])
        for i in range(len(points) - 1)
    ]


def plot(curves: dict[str, list[Point]], to: Path, title: str) -> None:
    """Time over rows, memory over rows, time per index over indices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for draw, style in zip(DRAWS, ("o-", "s--"), strict=True):
        for axis, curve, key in ((axes[0], "rows", "rows"), (axes[2], "indices", "indices")):
            points = [p for p in curves[curve] if p["draw"] == draw]
            x = [p[key] for p in points]
            for phase, colour in (("forward", "#6baed6"), ("backward", "#1f77b4")):
                name = "backward+update" if phase == "backward" else phase
                y = [p[f"{phase}_ms"] for p in points]
                axis.plot(x, y, style, color=colour, label=f"{name}, {draw}")
    points = [p for p in curves["rows"] if p["draw"] == DRAWS[0]]
    memory = [p["resident_bytes"] / 1e9 for p in points]
    axes[1].plot([p["rows"] for p in points], memory, "o-", color="#31a354", label="resident")
    need = [(p["weight_bytes"] + p["state_bytes"]) / 1e9 for p in points]
    axes[1].plot([p["rows"] for p in points], need, "k:", label="weights + state")
    for axis, x, y in zip(
        axes, ("rows of the table", "rows of the table", "indices of the batch"),
        ("ms", "GB", "ms"), strict=True,
    ):  # fmt: skip
        axis.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
        axis.legend(fontsize=8)
    axes[0].set_ylim(bottom=0.1)
    axes[0].set_title(f"{INDICES_OF_ROWS:,} indices", fontsize=10)
    axes[2].set_title(f"{curves['indices'][0]['rows']:,} rows", fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Measure both curves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--max-rows", type=float, default=ROWS[-1])
    parser.add_argument("--max-indices", type=float, default=INDICES[-1])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "curves.json")
    parser.add_argument("--plot", type=Path, default=HERE / "results" / "curves.svg")
    args = parser.parse_args()
    facts = environment()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    evict = Evictor()
    curves: dict[str, list[Point]] = {}

    cases = []
    for rows in (rows for rows in ROWS if rows <= args.max_rows):
        emb, memory = table_of(rows)
        cases += [({"draw": draw, **memory}, emb, rows, INDICES_OF_ROWS) for draw in DRAWS]
    curves["rows"] = sorted(
        measure(cases, args.repeats, args.threads, evict), key=lambda p: p["draw"], reverse=True
    )
    show(f"over rows: bfloat16, D={DIM}, {BAG} ids per bag", curves["rows"])
    del cases, emb

    rows = int(min(ROWS_OF_INDICES, args.max_rows))
    emb, memory = table_of(rows)
    cases = [
        ({"draw": draw, **memory}, emb, rows, count)
        for count in INDICES
        if count <= args.max_indices
        for draw in DRAWS
    ]
    curves["indices"] = sorted(
        measure(cases, args.repeats, args.threads, evict), key=lambda p: p["draw"], reverse=True
    )
    show("over indices", curves["indices"])

    growth = {
        f"{key}, {draw}": exponents([p for p in curves[key] if p["draw"] == draw], key)
        for key in curves
        for draw in DRAWS
    }
    print("\ntime of a step ~ (rows or indices)^k, from each point to the next:")
    for name, steps in growth.items():
        print(f"  {name}: k = {', '.join(f'{k:.2f}' for k in steps)}")
    settings = {"threads": args.threads, "repeats": args.repeats, "dim": DIM, "bag": BAG}
    result = {"environment": facts, "settings": settings, "curves": curves, "exponents": growth}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    try:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        title = f"{facts['cpu']}, {args.threads} thread(s), bfloat16, D={DIM}, {facts['time']}"
        plot(curves, args.plot, title)
    except ImportError as error:
        print(f"no plot: matplotlib does not import ({error})")


if __name__ == "__main__":
    main()
