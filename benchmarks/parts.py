"""Where a step's time goes: in the kernels, and around them.

    python benchmarks/parts.py [--workloads W1z W4] [--threads 1] [--repeats 15] [--json parts.json]

Times coldrow's forward and backward + update as ``cpu.py`` does, the caches emptied before each step, and
within them the native calls: what is left is Python and torch's autograd, whose code and data have left the
caches too. Beside them the floor, with its sort, and an autograd.Function that does nothing. With the native
call it can be seen how far the kernels are from the floor, and what no kernel could take away.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import BACKWARD, FORWARD, Batch, Coldrow, Floor, Missing, Nothing
from measuring import Evictor, environment
from workloads import POOLED, WORKLOADS, Workload

Parts = dict[str, list[float]]  # milliseconds, by what took them


def timed(parts: Parts, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run``, noting how long it takes."""

    def note(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter_ns()
        result = run(*args, **kwargs)
        parts[name].append((time.perf_counter_ns() - begin) * 1e-6)
        return result

    return note


def measure(work: Workload, repeats: int, evict: Callable[[], Any]) -> dict[str, float]:
    """Medians in milliseconds of the parts of a step, by name."""
    parts: Parts = defaultdict(list)
    start = [torch.empty(rows, work.dim).uniform_(-0.1, 0.1) for rows in work.rows]
    batches = [Batch.of(batch) for batch in work.batches(3)]
    ours = Coldrow(work, start, "touch", "fp32", "nearest")
    kernels = ours.module.table_batch.kernels
    for name, of in (("lookup", FORWARD), ("update", BACKWARD)):
        setattr(kernels, name, timed(parts, f"{of}: kernels", getattr(kernels, name)))
    anchor, out = torch.empty(0, requires_grad=True), torch.zeros(1, 1)
    grad = torch.ones(1, 1)
    floors = []
    for huge in (False, True):
        try:
            floors.append(Floor(work, start, huge))
        except Missing as reason:
            print(f"left out: {reason}")
    for round_ in range(repeats + 1):
        batch = batches[round_ % len(batches)]
        evict()
        for name, run in ours.phases():
            timed(parts, name, run)(batch)
        ours.release()
        evict()
        made = timed(parts, f"{FORWARD}: a Function that does nothing", Nothing.apply)(anchor, out)
        timed(parts, f"{BACKWARD}: a Function that does nothing", made.backward)(grad)
        for floor in floors:
            evict()
            for name, run in floor.phases():
                timed(parts, f"{floor.name}: {name}", run)(batch)
            floor.release()
        if round_ == 0:  # not counted
            parts.clear()
    return {name: statistics.median(samples) for name, samples in parts.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", nargs="+", choices=POOLED, default=list(POOLED))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    evict = Evictor()
    facts = environment()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    found = {name: measure(WORKLOADS[name], args.repeats, evict) for name in args.workloads}
    print(f"\nmilliseconds, {args.threads} thread(s)")
    print(f"{'':50}" + "".join(f"{name:>8}" for name in found))
    for part in sorted({part for parts in found.values() for part in parts}):
        print(f"{part:50}" + "".join(f"{parts[part]:8.2f}" for parts in found.values()))
    if args.json:
        settings = {"threads": args.threads, "repeats": args.repeats}
        result = {"environment": facts, "settings": settings, "milliseconds": found}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
