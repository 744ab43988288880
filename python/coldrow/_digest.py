"""The digest of a checkpoint file, kept in the file itself.

A file has 64 hexadecimal digits at a place that its own format allows (see :mod:`coldrow.checkpoint`). They
are BLAKE2b of the whole file with zeros (``"0"``) in that place, taken in parts of 16 MiB by several threads:
BLAKE2b of the parts' BLAKE2b. So every bit of the file counts, the digest's own among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

DIGITS = 64
NOT_YET = "0" * DIGITS  # what stands in the file before the digest does

_PART = 1 << 24


def of_file(file: int, place: int) -> str:
    """Return the digest of an open file (a descriptor) whose digits are at ``place``."""
    size = os.fstat(file).st_size

    def of_part(begin: int) -> bytes:
        part = read(file, begin, min(_PART, size - begin))
        low, high = max(place - begin, 0), min(place + DIGITS - begin, len(part))
        if low < high:  # the digits themselves are in it
            part = part[:low] + b"0" * (high - low) + part[high:]
        return hashlib.blake2b(part, digest_size=32).digest()

    begins = range(0, size, _PART)
    threads = min(len(begins), os.cpu_count() or 1, 8)
    parts: list[bytes] | None = None
    if threads > 1:
        # (RuntimeError: Python is at its end (atexit) and starts no threads.)
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(threads) as pool:
            parts = [*pool.map(of_part, begins)]
    if parts is None:
        parts = [*map(of_part, begins)]
    return hashlib.blake2b(b"".join(parts), digest_size=32).hexdigest()


def read(file: int, begin: int, count: int) -> bytes:
    """Return ``count`` bytes of an open file from ``begin`` on, or as many as there are."""
    parts = []
    while count > 0 and (part := os.pread(file, count, begin)):
        parts.append(part)
        begin, count = begin + len(part), count - len(part)
    return b"".join(parts)
