"""Random operations on 20 tables, each checked against the float64 reference: ``make soak``.

A round builds 20 tables of all optimizers, decays, roundings and dtypes (14 in three modules, 3 under an
optimizer beside torch's own lookup, 3 NumPy arrays under the functions) and runs some hundred operations on
them. After each one the table it was for is compared with what the reference makes of what was there before,
within the roundings of one step (support.py), and every other byte of every table with what it was. Between
rounds the memory of the process is looked at.

    python tests/python/robustness/soak.py --minutes 60
    python tests/python/robustness/soak.py --replay 123456     # the round that a failure names
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import pathlib
import platform
import subprocess
import sys
import time
import traceback
import warnings

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(__file__)))  # support.py

from soak_module import ModuleOwner
from soak_tables import ArrayOwner, Bits, OptimizerOwner, Tally, picked, random_updates

import coldrow
from coldrow import _core

OPERATIONS = 300  # of a round


def one_round(seed: int, tally: Tally, until: float) -> None:
    """20 tables and OPERATIONS operations on them, or as many as there is time for."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    updates = random_updates(rng, 20)
    owners = [
        ModuleOwner(rng, tally, updates[:6]),
        ModuleOwner(rng, tally, updates[6:11]),
        ModuleOwner(rng, tally, updates[11:14]),
        OptimizerOwner(rng, tally, updates[14:17]),
        ArrayOwner(rng, tally, updates[17:]),
    ]
    chance = np.array([6.0, 5.0, 3.0, 2.0, 2.0])
    for n in range(OPERATIONS):
        if time.monotonic() > until:
            return
        if n % 20 == 0:
            torch.set_num_threads(picked(rng, [1, 1, 1, 2]))
            _core.use_build(picked(rng, _core.builds()))
        owner = owners[int(rng.choice(len(owners), p=chance / chance.sum()))]
        weights = np.array(list(owner.operations.values()))
        name = str(rng.choice(list(owner.operations), p=weights / weights.sum()))
        others = [Bits(other) for other in owners if other is not owner]
        try:
            getattr(owner, name)()
            owner.settle()
            for bits in others:
                bits.unchanged(f"{name} of another owner")
        except BaseException:
            kind = type(owner).__name__
            print(f"operation {n} of round {seed}: {kind}.{name}()", flush=True)
            print(f"replay: python tests/python/robustness/soak.py --replay {seed}", flush=True)
            print("\n".join(map(str, (vars(owner).get("options"), owner.updates))), flush=True)
            raise
        tally.operations[name] += 1


def resident() -> float:
    """MiB of memory that the process has, freed memory given back first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, help="of the first round; the others count from it")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this one round")
    parser.add_argument("--growth", type=float, default=32.0, help="MiB that memory may grow by")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="an epoch-aware decay is in use")

    tally, start = Tally(), time.monotonic()
    if args.replay is not None:
        one_round(args.replay, tally, float("inf"))
        print(tally)
        return 0
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    commit = subprocess.run(
        ["git", "-C", os.path.dirname(__file__), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    print(f"coldrow {coldrow.__version__} {commit}, torch {torch.__version__}, "
          f"{platform.machine()} {_core.build()}, first seed {seed}", flush=True)  # fmt: skip
    until, rounds, memory = start + 60 * args.minutes, 0, []
    while time.monotonic() < until or rounds == 0:
        one_round(seed + rounds, tally, until)
        rounds += 1
        memory.append(resident())
        minutes, busy = (time.monotonic() - start) / 60, time.process_time() / 60
        print(
            f"{minutes:.1f} min ({busy:.1f} of CPU), {rounds} rounds: {tally}, {memory[-1]:.0f} MiB",
            flush=True,
        )
    settled = memory[min(3, len(memory) - 1)]  # caches and pools have filled
    for name, count in tally.operations.most_common():
        print(f"  {name:20} {count:9,}")
    print(f"memory {settled:.0f} MiB after the first rounds, {max(memory):.0f} at most, "
          f"{memory[-1]:.0f} at the end; accepted: {args.growth:.0f} more", flush=True)  # fmt: skip
    if memory[-1] > settled + args.growth:
        print("soak FAILED: memory grew")
        return 1
    print(f"soak passed: {rounds} rounds, {tally}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception:
        traceback.print_exc()
        print("soak FAILED")
        sys.exit(1)
