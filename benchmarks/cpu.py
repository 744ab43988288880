"""Time coldrow's CPU path beside its peers and beside the least that the machine allows.

    python benchmarks/cpu.py [--quick] [--json result.json] [--workloads W1z W4] ...

See README.md here for what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from pathlib import Path

from preload import preload_libc10
from workloads import WORKLOADS, Workload


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--json", type=Path, help="write every sample and ratio to this file")
    parser.add_argument("--plot", type=Path, help="draw the ratios to the floor, .svg or .png")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "fp16", "bf16"),
                        default=["fp32", "fp16", "bf16"])  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, help="rounds (30; quick: 5)")
    parser.add_argument("--batches", type=int, help="batches taken in rotation (8; quick: 2)")
    parser.add_argument("--only", default="", help="contestants whose name matches this pattern")
    parser.add_argument(
        "--rounding", choices=("nearest", "stochastic"), default="nearest",
        help="of coldrow's 16-bit weights",
    )  # fmt: skip
    parser.add_argument(
        "--evict", choices=("step", "phase"), default="step",
        help="empty the caches before each step, or before its backward too",
    )  # fmt: skip
    args = parser.parse_args()
    args.repeats = args.repeats or (5 if args.quick else 30)
    args.batches = args.batches or (2 if args.quick else 8)
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    preload_libc10()
    # Only now: they import torch.
    import calls
    import measuring
    import report
    import torch
    from contestants import Batch, Contestant, Missing, candidates

    notes = measuring.Notes()

    def enter(work: Workload) -> list[Contestant]:
        """Build the contestants of one workload; those that cannot run leave a note."""
        generator = torch.Generator().manual_seed(0)
        bound = work.dim**-0.5
        start = [
            torch.empty(rows, work.dim).uniform_(-bound, bound, generator=generator)
            for rows in work.rows
        ]
        entered = []
        for name, make in candidates(work, args.dtypes, args.rounding):
            if re.search(args.only, name):
                try:
                    entered.append(make(start))
                except Missing as reason:
                    notes(f"left out: {reason}")
        return entered

    facts = measuring.environment()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    evict = measuring.Evictor()
    timings: list[measuring.Timing] = []
    for name in args.workloads:
        work = WORKLOADS[name]
        torch.set_num_threads(max(args.threads))
        batches = [Batch.of(batch) for batch in work.batches(args.batches)]
        contestants = enter(work)
        if not contestants:
            notes(f"no contestant on {name}")
            continue
        measuring.warm_up(work, contestants, batches, notes)
        gc.collect()
        gc.disable()
        for threads in args.threads:
            measured = measuring.measure(
                work, contestants, batches, threads, args.repeats, evict, args.evict == "phase"
            )
            report.show(measured)
            restless = sum(high > 1.5 * low for low, high in (t.quartiles for t in measured))
            if restless > len(measured) // 4:
                notes(f"{name}, threads={threads}: a busy machine, do not use these figures")
            timings += measured
        gc.enable()
        del contestants
    if not timings:
        raise SystemExit("nothing was measured")
    for name, threads in report.not_more_processors(timings):
        notes(
            f"{name}, threads={threads}: the floor gains nothing from them, so the processors were not there: "
            "do not use these figures"
        )
    ratios = report.show_ratios(timings)
    figures = report.show_figures(timings)
    took = calls.measure(only="^coldrow: ") if "coldrow" in sys.modules else {}
    if took:
        figures += report.show_calls(took)
    if args.json:
        result = {
            "environment": facts,
            "settings": {key: str(value) for key, value in vars(args).items()},
            "notes": notes.texts,
            "timings": [timing.summary() for timing in timings],
            "ratios": ratios,
            "figures": figures,
            "calls_us": took,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\n{args.json}")
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        try:
            report.plot(timings, args.plot, f"{facts['cpu']}, {facts['time']}, fp32")
            print(args.plot)
        except ImportError as error:
            notes(f"no plot: matplotlib does not import ({error})")


if __name__ == "__main__":
    main()
