"""What this build can do on a GPU."""

from coldrow import _engines

__all__ = ["is_available", "is_built"]


def is_built() -> bool:
    """Return whether this build of coldrow contains CUDA kernels."""
    return _engines.device is not None


def is_available() -> bool:
    """Return whether it contains CUDA kernels and this machine has a device and a driver to run them.

    (torch must be a build for CUDA too, for its tensors to be there.)
    """
    return _engines.device is not None and _engines.device.unavailable() is None
