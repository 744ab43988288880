"""CUDA source compiled at run time by NVRTC: no nvcc, no C++ compiler and no GPU needed.

NVRTC is one library, loaded when it is first used. It comes with the CUDA builds of torch, with
``pip install nvidia-cuda-nvrtc`` (CUDA 13) or ``nvidia-cuda-nvrtc-cu12``, and with a CUDA toolkit.
Its releases from 12.4 on compile coldrow's headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from coldrow import _paths

#: The flags under which every build gives the same bits (CMake: ``coldrow::strict``).
STRICT = ("-fmad=false",)

# NVRTC takes a function that says neither __host__ nor __device__ for a host function, and refuses
# those. The headers have some (what a host does once per step), and so may a policy.
_ALWAYS = ("--std=c++20", "-default-device")


class CompileError(RuntimeError):
    """The source does not compile; the compiler's message is the text, and in :attr:`log`."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


def compile(source: str, name: str, arch: str, options: Sequence[str] = ()) -> bytes:
    """Compile ``source`` with coldrow's headers and strict flags.

    Args:
        source: The translation unit.
        name: What the compiler's messages call it.
        arch: ``"sm_90"`` and the like for machine code (a cubin), ``"compute_90"`` for PTX.
        options: Further NVRTC options, after coldrow's own.

    Returns:
        The cubin, or the PTX with the zero byte at its end that the driver wants.

    Raises:
        CompileError: The source does not compile.
        FileNotFoundError: There is no NVRTC.

    Warnings of the compiler are Python warnings.
    """
    return load().compile(
        source, name, (f"-arch={arch}", *_ALWAYS, *STRICT, f"-I{_paths.includes()}", *options)
    )


class Nvrtc:
    """One NVRTC library."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        # A second library that NVRTC opens by name. Some releases do not look for it beside
        # themselves; they find it once it is loaded.
        builtins = Path(path).with_name(f"libnvrtc-builtins.so.{major.value}.{minor.value}")
        self._builtins = ctypes.CDLL(str(builtins)) if builtins.exists() else None

    def compile(self, source: str, name: str, options: Sequence[str]) -> bytes:
        """Compile with exactly these options; see :func:`compile`."""
        program = ctypes.c_void_p()
        self._call(
            *("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode()),
            *(0, None, None),
        )
        try:
            texts = [option.encode() for option in options]
            array = (ctypes.c_char_p * len(texts))(*texts)
            with _kept_locale():
                status = self._library.nvrtcCompileProgram(program, len(texts), array)
            log = self._get("ProgramLog", program).rstrip(b"\0\n").decode(errors="replace")
            if status:
                what = f"{self._error(status)}, compiling {name} with {' '.join(options)}"
                raise CompileError(f"{what}:\n{log}", log)
            if log:
                warnings.warn(log, stacklevel=3)
            return self._get("CUBIN", program) or self._get("PTX", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        if size.value:
            self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} of {self.path}: {self._error(status)}")

    def _error(self, status: int) -> str:
        get = self._library.nvrtcGetErrorString
        get.restype = ctypes.c_char_p
        text: bytes = get(status)
        return text.decode()


@contextlib.contextmanager
def _kept_locale() -> Iterator[None]:
    # Releases before 12.9 leave the thread in the "C" locale, where Python reads files as ASCII.
    use = ctypes.CDLL(None).uselocale
    use.restype, use.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    before = use(None)
    try:
        yield
    finally:
        use(before)


@functools.cache
def load() -> Nvrtc:
    """Load the first library of :func:`candidates` that there is."""
    tried = []
    for path in candidates():
        try:
            return Nvrtc(path)
        except OSError as error:
            tried.append(f"\n  {error}")
    raise FileNotFoundError(
        "NVRTC is not installed: pip install nvidia-cuda-nvrtc. Tried:" + "".join(tried)
    )


def candidates() -> Iterator[str]:
    """Yield where NVRTC may be: packages of pip, the loader's path, a toolkit. Newest first."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or []:
        for folder in ("cu13", "cuda_nvrtc"):  # CUDA 13's package; CUDA 12's
            yield from map(str, sorted(Path(root, folder, "lib").glob("libnvrtc.so.*")))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")
    for root in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        yield str(Path(root, "lib64", "libnvrtc.so"))
    yield "/usr/local/cuda/lib64/libnvrtc.so"
