"""What this build can do on a GPU."""

from coldrow._backends import registry

__all__ = ["is_available", "is_built"]


def is_built() -> bool:
    """Return whether this build of coldrow contains CUDA kernels."""
    return registry.accelerator() is not None


def is_available() -> bool:
    """Return whether it contains CUDA kernels and this machine has a device and a driver to run them.

    (torch must be a build for CUDA too, for its tensors to be there.)
    """
    backend = registry.accelerator()
    return backend is not None and backend.unavailable() is None
