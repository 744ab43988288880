"""Run FBGEMM's own tests of ROWWISE_RMSPROP_AR against coldrow.compat.fbgemm: only imports are changed.

FBGEMM's wheel carries no tests, so FBGEMM_SOURCE must name a checkout of its repository (1.9 or newer).
Its files are read from there and the changed copies are written under build/: none is part of this
repository. Run by `make test-fbgemm`, in an environment that has fbgemm_gpu.

The tests, CPU cases: the class RowwiseRMSpropARTest and test_backward_optimizers_rowwise_rmsprop_ar. The
latter draws most of its examples too large for its own CPU limit and returns from them; so its harness
(`execute_backward_optimizers_`) is run here on small examples as well.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path("fbgemm_gpu/test")
FILE = Path("tbe/training/backward_optimizers_test.py")
SUPPORT = [
    "test_utils.py",
    "tbe/__init__.py",
    "tbe/common.py",
    "tbe/training/__init__.py",
]
# The modules whose names are in coldrow.compat.fbgemm. Helpers of the tests stay FBGEMM's own.
REPLACED = re.compile(
    r"^from fbgemm_gpu\.(split_embedding_configs|split_table_batched_embeddings_ops_training"
    r"|split_table_batched_embeddings_ops_common|tbe\.config\.embedding_config) import",
    re.MULTILINE,
)
SELECTED = "RowwiseRMSpropARTest or test_backward_optimizers_rowwise_rmsprop_ar"
EXAMPLES = 150


def prepare(source: Path, target: Path, change: bool) -> int:
    """Copy what the tests need to ``target``; return how many imports were changed."""
    shutil.rmtree(target, ignore_errors=True)
    for name in [*SUPPORT, str(FILE)]:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / TESTS / name, path)
    text = (target / FILE).read_text()
    if not change:
        return 0
    text, changed = REPLACED.subn("from coldrow.compat.fbgemm import", text)
    (target / FILE).write_text(text)
    return changed


def has_ar() -> bool:
    """Return whether the FBGEMM installed has ROWWISE_RMSPROP_AR (1.9 does)."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as training

    build = training.SplitTableBatchedEmbeddingBagsCodegen.__init__
    return "ar_alpha" in inspect.signature(build).parameters


def run(where: Path) -> int:
    """Run the selected tests by pytest."""
    command = [sys.executable, "-m", "pytest", "-p", "no:warnings", str(FILE), "-k", SELECTED]
    environment = {**os.environ, "PYTHONPATH": str(where)}
    return subprocess.run(command, cwd=where, env=environment, check=False).returncode


def sweep(where: Path) -> int:
    """Run their harness on small examples of their test's own parameters; return how many looked up."""
    import numpy as np
    import torch

    sys.path.insert(0, str(where))
    theirs = importlib.import_module("tbe.training.backward_optimizers_test")
    lookups = 0

    class Counted(theirs.SplitTableBatchedEmbeddingBagsCodegen):
        def forward(self, *args, **kwargs):
            nonlocal lookups
            lookups += 1
            return super().forward(*args, **kwargs)

    theirs.SplitTableBatchedEmbeddingBagsCodegen = Counted
    case = theirs.BackwardOptimizersTest("execute_backward_optimizers_")
    rng = np.random.default_rng(0)
    kinds, modes = theirs.OptimType, theirs.WeightDecayMode
    cases = [
        (kinds.ROWWISE_RMSPROP_AR, modes.NONE),
        (kinds.EXACT_ADAGRAD, modes.NONE),
        # (On fp32 tables of one feature FBGEMM's CPU kernel leaves the decay out, and fails this.)
        (kinds.EXACT_ROWWISE_ADAGRAD, modes.DECOUPLE),
    ]
    for optimizer, mode in cases:
        for example in range(EXAMPLES):
            np.random.seed(example)  # noqa: NPY002  # what their harness draws from
            torch.manual_seed(example)
            pooling = theirs.PoolingMode.SUM if example % 3 else theirs.PoolingMode.MEAN
            with contextlib.redirect_stdout(io.StringIO()):
                case.execute_backward_optimizers_(
                    T=int(rng.integers(1, 6)),
                    D=int(rng.integers(2, 33)),
                    B=int(rng.integers(1, 9)),
                    log_E=3,
                    L=int(rng.integers(2, 7)),
                    weighted=bool(rng.integers(2)) and pooling == theirs.PoolingMode.SUM,
                    mixed=bool(rng.integers(2)),
                    mixed_B=False,
                    optimizer=optimizer,
                    long_segments=bool(rng.integers(2)),
                    pooling_mode=pooling,
                    use_cpu=True,
                    weight_decay_mode=mode,
                )
    return lookups


def main() -> int:
    """Prepare and run; 0 where all passed, or where there is nothing to run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path("build/fbgemm"), help="where copies go")
    parser.add_argument(
        "--real", action="store_true", help="run them unchanged, against FBGEMM itself"
    )
    args = parser.parse_args()
    source = os.environ.get("FBGEMM_SOURCE")
    if not source:
        print(
            "FBGEMM's own tests NOT run: its wheel carries none. Set FBGEMM_SOURCE to a checkout of its "
            "repository."
        )
        return 0
    file = Path(source) / TESTS / FILE
    if not file.exists() or "RowwiseRMSpropARTest" not in file.read_text():
        print(f"error: FBGEMM_SOURCE={source}: no RowwiseRMSpropARTest in {TESTS / FILE}")
        return 1
    if args.real and not has_ar():
        print(
            "FBGEMM's own tests NOT run against FBGEMM: the one installed has no ROWWISE_RMSPROP_AR."
        )
        return 0
    where = (args.build / ("real" if args.real else "rewritten")).resolve()
    changed = prepare(Path(source), where, change=not args.real)
    if args.real:
        print("FBGEMM's own tests, unchanged, against FBGEMM:")
        return run(where)
    print(f"FBGEMM's own tests against coldrow.compat.fbgemm ({changed} import lines changed):")
    failed = run(where)
    if not failed:
        lookups = sweep(where)
        print(f"their harness on {3 * EXAMPLES} smaller examples: passed ({lookups} lookups)")
    return failed


if __name__ == "__main__":
    sys.exit(main())
