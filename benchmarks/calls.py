"""What a call costs when there is next to nothing to do: one table, one bag, one id.

    python benchmarks/calls.py [--json calls.json] [--profile]

Everything is in the caches. Cases are timed in turn, some thousand calls at a time; a figure is the
median over the turns of the mean time of a call. The first lines are what no module of torch can go
below: an autograd.Function that does nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from preload import preload_libc10

ROWS, DIM = 1000, 64
Case = tuple[str, Callable[[], Any]]


def torch_cases() -> Iterator[Case]:
    """An autograd.Function that does nothing, and torch's own module."""
    import torch
    from contestants import Nothing

    anchor, out = torch.empty(0, requires_grad=True), torch.zeros(1, DIM)
    grad = torch.ones(1, DIM)
    yield "empty autograd.Function: forward", lambda: Nothing.apply(anchor, out)
    yield (
        "empty autograd.Function: forward + backward",
        lambda: Nothing.apply(anchor, out).backward(grad),
    )
    ids, offsets = torch.tensor([3]), torch.tensor([0])
    torch.sparse.check_sparse_tensor_invariants.disable()  # the default; said, it is silent
    for optimizer in ("SparseAdam", "Adagrad"):
        bag = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum", sparse=True)
        steps = getattr(torch.optim, optimizer)(bag.parameters(), lr=0.01)

        def train(bag: Any = bag, steps: Any = steps) -> None:
            bag(ids, offsets).backward(grad)
            steps.step()
            steps.zero_grad()

        if optimizer == "SparseAdam":
            yield "torch EmbeddingBag: forward", lambda bag=bag: bag(ids, offsets)
        yield f"torch EmbeddingBag: forward + backward, {optimizer}", train


def coldrow_cases() -> Iterator[Case]:
    """The module, and below it the functional call on arrays."""
    import torch

    import coldrow
    from coldrow.nn import Table, TableBatchedEmbeddingBags

    ids, offsets, grad = torch.tensor([3]), torch.tensor([0, 1]), torch.ones(1, DIM)
    decays = {
        "touch": coldrow.LinearClipped(alpha=1e-3),
        "read": coldrow.CumulativeLinear(half_life=1000.0),
    }
    for charge, decay in decays.items():
        update = coldrow.RowUpdate(coldrow.RowwiseRMSprop(lr=0.01), decay)
        emb = TableBatchedEmbeddingBags(
            [Table("t", ROWS, DIM, features=["f"])], update, charge=charge
        )
        prefix = "coldrow" if charge == "touch" else f"coldrow, {charge}"

        def evaluate(emb: Any = emb) -> None:
            with torch.no_grad():
                emb(ids, offsets)

        yield f"{prefix}: forward under no_grad", evaluate
        yield f"{prefix}: forward", lambda emb=emb: emb(ids, offsets)
        yield f"{prefix}: forward + backward", lambda emb=emb: emb(ids, offsets).backward(grad)
    clocks = {"torch": 0, "NumPy": 0}
    tensors = [torch.zeros(ROWS, DIM), grad, ids, torch.zeros(ROWS)]
    tensors.append(torch.zeros(ROWS, dtype=torch.int32))
    for library, arrays in {"torch": tensors, "NumPy": [t.numpy().copy() for t in tensors]}.items():

        def apply(library: str = library, arrays: Any = arrays) -> None:
            clocks[library] += 1
            coldrow.rowwise_rmsprop_ar_(*arrays, step=clocks[library], lr=0.01)

        yield f"coldrow.rowwise_rmsprop_ar_ on {library} arrays", apply


def fbgemm_cases() -> Iterator[Case]:
    """FBGEMM's module."""
    import torch
    from contestants import Fbgemm, Missing
    from workloads import Workload

    work = Workload("call", rows=(ROWS,), dim=DIM, batch=1, bag=1, zipf=None)
    ids, offsets, grad = torch.tensor([3]), torch.tensor([0, 1]), torch.ones(1, DIM)
    for optimizer in ("AR", "Adagrad"):
        try:
            module = Fbgemm(work, [torch.zeros(ROWS, DIM)], optimizer, "fp32").module
        except Missing:
            continue
        yield f"FBGEMM {optimizer}: forward", lambda m=module: m(ids, offsets)
        yield (
            f"FBGEMM {optimizer}: forward + backward",
            lambda m=module: m(ids, offsets).backward(grad),
        )


def measure(only: str = "", turns: int = 15, calls: int = 1000) -> dict[str, float]:
    """Microseconds per call, by case, of those whose name matches ``only``."""
    import torch

    torch.set_num_threads(1)
    cases = [
        (name, call)
        for made in (torch_cases, coldrow_cases, fbgemm_cases)
        for name, call in made()
        if re.search(only, name)
    ]
    samples: dict[str, list[float]] = {name: [] for name, _ in cases}
    enabled = gc.isenabled()
    gc.disable()
    for turn in range(-1, turns):  # turn -1 is not counted
        for name, call in cases:
            begin = time.perf_counter_ns()
            for _ in range(calls):
                call()
            took = (time.perf_counter_ns() - begin) * 1e-3 / calls
            if turn >= 0:
                samples[name].append(took)
        gc.collect()
    if enabled:
        gc.enable()
    return {name: statistics.median(took) for name, took in samples.items()}


def profile(calls: int = 20000) -> None:
    """Print which functions a training step through the module spends its time in.

    The profiler adds to every call it sees, so this says where to look and not how long it takes.
    """
    import torch

    torch.set_num_threads(1)
    step = dict(coldrow_cases())["coldrow: forward + backward"]
    step()
    watch = cProfile.Profile()
    watch.enable()
    for _ in range(calls):
        step()
    watch.disable()
    print(f"\nown time of functions over {calls:,} steps, under the profiler:")
    pstats.Stats(watch).strip_dirs().sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name matches this pattern")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--calls", type=int, default=1000, help="per turn and case")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    preload_libc10()
    from measuring import environment

    facts = environment()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    print(f"\nmicroseconds per call; one table of {ROWS} rows, D={DIM}, one bag of one id")
    took = measure(args.only, args.turns, args.calls)
    for name, micro in took.items():
        print(f"{name:52}{micro:8.2f}")
    if args.profile:
        profile()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": facts, "us": took}, indent=1) + "\n")


if __name__ == "__main__":
    main()
