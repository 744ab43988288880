"""Plain values in a state_dict, which holds tensors only."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def described(values: Any) -> Tensor:
    """Return plain values as a tensor: the codes of their JSON text, float32 ``[n]``.

    ASCII codes are exact in every floating dtype, so the text survives tools that average or cast what a
    state_dict holds.
    """
    return torch.tensor(list(json.dumps(values).encode("ascii")), dtype=torch.float32)


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
