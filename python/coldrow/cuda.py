"""What this build can do on a GPU."""

__all__ = ["is_available", "is_built"]


def is_built() -> bool:
    """Return whether this build of coldrow contains CUDA kernels."""
    return False


def is_available() -> bool:
    """Return whether it contains CUDA kernels and this machine can run them."""
    return False
