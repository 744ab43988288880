"""Time policies compiled at run time beside the built-in ones of the same formulas.

    python benchmarks/jit.py [--workload W1u] [--repeats 60] [--json result.json]

Both train the same tables on the same batches, interleaved, with the caches emptied before each step;
see README.md here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import contestants
import measuring
import torch
from contestants import ALPHA, BACKWARD, BETA, EPS, FORWARD, LR, MIN_SHRINKAGE
from workloads import WORKLOADS

import coldrow

LINEAR = """
struct Linear {
  float alpha, min_shrinkage;
  COLDROW_HD float operator()(std::int32_t gap, float lr) const {
    if (gap <= 0) return 1.0f;
    const float charge = static_cast<float>(static_cast<double>(lr * alpha) * gap);
    return coldrow::max_of(1.0f - coldrow::min_of(charge, 1.0f), min_shrinkage);
  }
};"""

HALF_LIFE = """
struct HalfLife {
  double half_life;
  COLDROW_HD float operator()(std::int32_t gap, float) const {
    return gap <= 0 ? 1.0f : static_cast<float>(coldrow::exp2_fixed(-1.0 / half_life * gap));
  }
};"""

RMSPROP = """
struct RMSprop {
  float eps, ema_beta;
  static constexpr int scalar_states = 1;
  static constexpr int vector_states = 0;
  static constexpr bool elements_finite = true;
  COLDROW_HD coldrow::RowMultiplier row(float* s, float mean_square, float lr, std::int32_t) const {
    s[0] = coldrow::math::fma(ema_beta, s[0], (1.0f - ema_beta) * mean_square);
    return {lr / (coldrow::math::sqrt(s[0]) + eps)};
  }
  COLDROW_HD float element(const coldrow::RowMultiplier& row, float g, float*) const {
    return row.multiplier * g;
  }
};"""


def policies() -> dict[str, dict[str, object]]:
    """What each contestant has that others have not; pairs of one formula one after another."""
    linear = {"alpha": ALPHA, "min_shrinkage": MIN_SHRINKAGE}
    rmsprop = {"eps": EPS, "ema_beta": BETA}
    jit = coldrow.jit
    return {
        "decay, touch: built-in": {"decay": coldrow.LinearClipped(**linear)},
        "decay, touch: jit": {"decay": jit.decay("Linear", LINEAR, **linear)},
        "decay, read: built-in": {"decay": coldrow.Exponential(half_life=contestants.HALF_LIFE)},
        "decay, read: jit": {
            "decay": jit.decay("HalfLife", HALF_LIFE, half_life=contestants.HALF_LIFE)
        },
        "optimizer: built-in": {"optimizer": coldrow.RowwiseRMSprop(lr=LR, **rmsprop)},
        "optimizer: jit": {"optimizer": jit.optimizer("RMSprop", RMSPROP, lr=LR, **rmsprop)},
    }


def compile_times() -> dict[str, float]:
    """Seconds to make a policy for the first time, and to find it in the cache."""
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        made = (
            ("decay", lambda: coldrow.jit.decay("HalfLife", HALF_LIFE, half_life=1.0)),
            ("optimizer", lambda: coldrow.jit.optimizer("RMSprop", RMSPROP, eps=1.0, ema_beta=0.0)),
        )
        os.environ["COLDROW_JIT_CACHE"] = folder
        for name, make in made:
            for what in ("first", "cached"):
                coldrow.jit.compiler.forget()
                begin = time.perf_counter()
                make()
                times[f"{name}, {what}"] = time.perf_counter() - begin
        del os.environ["COLDROW_JIT_CACHE"]
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="W1u")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    facts = measuring.environment()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    seconds = compile_times()
    for what, took in seconds.items():
        print(f"{what}: {took * 1e3:.1f} ms")

    work = WORKLOADS[args.workload]
    torch.set_num_threads(1)
    batches = [contestants.Batch.of(batch) for batch in work.batches(8)]
    start = [torch.empty(rows, work.dim).uniform_(-0.1, 0.1) for rows in work.rows]
    entered = []
    for name, policy in policies().items():
        charge = "read" if "read" in name else "touch"
        entered.append(contestants.Coldrow(work, start, charge, "fp32", "nearest", **policy))
        entered[-1].name = name
    measuring.warm_up(work, entered, batches, measuring.Notes())
    gc.disable()
    timings = measuring.measure(work, entered, batches, 1, args.repeats, measuring.Evictor())
    samples = {(t.contestant, t.phase): t.samples for t in timings}
    ratios = {}
    print(f"\n{work}; one thread, fp32; jit over built-in")
    for name in policies():
        if not name.endswith("built-in"):
            continue
        for phase in (FORWARD, BACKWARD):
            ours = samples[name, phase]
            theirs = samples[name.replace("built-in", "jit"), phase]
            # Each round took the same batch: so the median of the rounds' ratios.
            ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            what = f"{name.partition(':')[0]}, {phase}"
            ratios[what] = ratio
            print(f"{what:32} {statistics.median(ours):8.3f} ms {ratio:8.3f}x")
    if args.json:
        result = {"environment": facts, "workload": work.name, "seconds": seconds, "ratios": ratios}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
