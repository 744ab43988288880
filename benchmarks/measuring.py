"""How contestants are checked and timed: see README.md here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from contestants import (
    BACKWARD,
    FLOOR,
    FLOOR_HUGE,
    FORWARD,
    HERE,
    Batch,
    Contestant,
    Fbgemm,
    executable_anonymous_bytes,
)
from torch import nn
from workloads import Workload


class Notes:
    """Remarks: each printed once, and kept for the result file."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)
            print(f"note: {text}", flush=True)


def l3_bytes() -> int:
    """Size of the last-level cache, as the kernel tells it; 32 MiB where it does not."""
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index3/size")
    ]
    return int(sizes[0].removesuffix("K")) * 1024 if sizes else 32 << 20


class Evictor:
    """Pushes everything else out of the caches and the TLB.

    Reads a buffer of three times the last-level cache, one value per cache line and in random
    order: caches that resist streaming keep part of what they held when the order is sequential.
    """

    def __init__(self) -> None:
        lines = 3 * l3_bytes() // 64
        self.buffer = torch.ones(lines * 16)
        self.order = torch.randperm(lines) * 16
        self.sink = torch.empty(lines)

    def __call__(self) -> None:
        torch.take(self.buffer, self.order, out=self.sink)


@dataclass
class Timing:
    """All samples of one phase of one contestant, in milliseconds."""

    workload: str
    threads: int
    contestant: str
    phase: str
    samples: list[float] = field(default_factory=list)
    page_faults: int = 0  #: over all samples

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def summary(self) -> dict[str, Any]:
        low, high = self.quartiles
        return {**asdict(self), "median": self.median, "q1": low, "q3": high}


def warm_up(
    work: Workload, contestants: list[Contestant], batches: list[Batch], notes: Notes
) -> None:
    """Run every batch once through every contestant, and check that each does its work.

    The first forward must give what torch gives in float32, the rows of a batch must move, and
    the rows of no batch must stay.
    """
    first = batches[0]
    last = len(work.rows) - 1  # the table to look at
    ids = first.indices.chunk(len(work.rows))[last]
    seen = torch.cat([batch.indices.chunk(len(work.rows))[last] for batch in batches]).unique()
    unseen = torch.ones(work.rows[last], dtype=torch.bool)
    unseen[seen] = False
    for contestant in contestants:
        before = contestant.weight(last).detach().float().clone()
        if work.pooled:
            expected = nn.functional.embedding_bag(ids.view(-1, work.bag), before, mode="sum")
        else:
            expected = before[ids]
        for i, batch in enumerate(batches):
            for phase, run in contestant.phases():
                made = executable_anonymous_bytes()
                run(batch)
                if isinstance(contestant, Fbgemm):
                    CODE[contestant.name, phase] += executable_anonymous_bytes() - made
                if i == 0 and phase == FORWARD:
                    error = (contestant.output(last) - expected).abs().max().item()
                    if error > contestant.tolerance:
                        raise SystemExit(f"{contestant.name}: forward is off by {error}")
        after = contestant.weight(last).detach().float()
        moved = (after != before).any(dim=1)
        if not moved[seen].all() or moved[unseen].any() or not after.isfinite().all():
            raise SystemExit(f"{contestant.name}: wrong rows changed on {work.name}")
    compare_with_floor(contestants, last)
    if work.pooled:  # without pooling there is no such path
        say_whether_compiled([c for c in contestants if isinstance(c, Fbgemm)], notes)


# Bytes of code made at run time, by contestant and phase, in the life of this process.
CODE: defaultdict[tuple[str, str], int] = defaultdict(int)


def say_whether_compiled(contestants: Sequence[Fbgemm], notes: Notes) -> None:
    """Check that FBGEMM has its fast path, which is compiled when it first runs.

    That is the update of fp32 row-wise Adagrad. (The forward is compiled too, but torch's own
    ``embedding_bag``, which has run by then, shares that code.)
    """
    name = "FBGEMM Adagrad fp32"
    if name in {contestant.name for contestant in contestants} and CODE[name, BACKWARD] <= 0:
        notes(f"{name} made no code at run time: its slow reference kernels run")


def compare_with_floor(contestants: list[Contestant], table: int) -> None:
    """The floor computes the same update as coldrow on touch: hold one against the other."""
    by_name = {contestant.name: contestant for contestant in contestants}
    for name in (FLOOR, FLOOR_HUGE):
        if name in by_name and "coldrow touch fp32" in by_name:
            ours = by_name["coldrow touch fp32"].weight(table)
            torch.testing.assert_close(
                by_name[name].weight(table), ours.detach(), rtol=1e-4, atol=1e-4, msg=name
            )


def measure(
    work: Workload,
    contestants: list[Contestant],
    batches: list[Batch],
    threads: int,
    repeats: int,
    evict: Evictor,
    every_phase: bool = False,
) -> list[Timing]:
    """Time ``repeats`` rounds; in each, all contestants take the same batch in turn.

    Caches are emptied before every step, or before every phase of it.
    """
    torch.set_num_threads(threads)
    timings: dict[tuple[str, str], Timing] = {}
    for round_ in range(-1, repeats):  # round -1 is not counted
        batch = batches[round_ % len(batches)]
        turn = round_ % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            for position, (phase, run) in enumerate(contestant.phases()):
                if position == 0 or every_phase:
                    evict()
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                begin = time.perf_counter_ns()
                run(batch)
                took = (time.perf_counter_ns() - begin) * 1e-6
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
                if round_ >= 0:
                    key = (contestant.name, phase)
                    timing = timings.setdefault(key, Timing(work.name, threads, *key))
                    timing.samples.append(took)
                    timing.page_faults += faults
            contestant.release()
    for name in {name for name, _ in timings} & {FLOOR, FLOOR_HUGE}:
        parts = zip(timings[name, "sort"].samples, timings[name, "update"].samples, strict=True)
        samples = [sort + update for sort, update in parts]
        timings[name, BACKWARD] = Timing(work.name, threads, name, BACKWARD, samples)
    return list(timings.values())


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    versions = {}
    for package in ("coldrow", "torch", "fbgemm-gpu-cpu", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": cpu.group(1) if cpu else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "l3_bytes": l3_bytes(),
        "transparent_hugepage": pages.read_text().strip() if pages.exists() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "commit": commit,
        **versions,
    }
