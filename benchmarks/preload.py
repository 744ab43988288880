"""FBGEMM finds the CPU's instruction sets only with torch's libc10 loaded first."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path


def preload_libc10() -> None:
    """Start this program again with torch's libc10 loaded first, where FBGEMM needs that.

    FBGEMM 1.9's own copy of what detects the CPU's instruction sets is never filled in, so it runs
    scalar code; with libc10 loaded first that one is found, which torch fills in.
    """
    try:
        version = importlib.metadata.version("fbgemm-gpu-cpu")
    except importlib.metadata.PackageNotFoundError:
        return
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None or tuple(map(int, version.split(".")[:2])) < (1, 9):
        return
    library = Path(spec.origin).parent / "lib" / "libc10.so"
    loaded = os.environ.get("LD_PRELOAD", "").split(":")
    if library.exists() and not any(name.endswith("/libc10.so") for name in loaded):
        preload = ":".join([str(library), *filter(None, loaded)])
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "LD_PRELOAD": preload})
