"""Plain values in a state_dict, which holds tensors only."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def described(values: Any) -> Tensor:
    """Return plain values as a tensor: the codes of their JSON text and of spaces behind it, float32 ``[n]``.

    ASCII codes are exact in every floating dtype, so the text survives tools that average or cast what a
    state_dict holds. ``n`` is a power of two, 1024 at least: torch.distributed.checkpoint reads a tensor into
    one of the same shape, and other values, such as another learning rate, should have that.
    """
    text = json.dumps(values).encode("ascii")
    size = max(1024, 1 << (len(text) - 1).bit_length())
    return torch.tensor(list(text.ljust(size)), dtype=torch.float32)


def plain_values(given: Any) -> Any:
    """Return the plain values in what :func:`described` made; anything but a tensor is returned as it is.

    Raises:
        ValueError: a tensor that is no such text.
    """
    if not isinstance(given, Tensor):
        return given
    codes = given.detach().to("cpu", torch.float64).round()
    if codes.dim() != 1 or not bool(((codes >= 0) & (codes < 128)).all()):
        raise ValueError(f"got a tensor {list(given.shape)} that is no text")
    return json.loads(bytes(codes.to(torch.uint8).tolist()))
