"""Plain values in a state_dict, which holds tensors only."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor


def described(values: Any, room: int = 1) -> Tensor:
    """Return plain values as a tensor: the codes of their JSON text, float32 ``[n]``.

    ASCII codes are exact in every floating dtype, so the text survives tools that average or cast what a
    state_dict holds.

    Args:
        values: what JSON can say.
        room: n, doubled until the text fits: other values then make a tensor of the same shape, which is
            what tools that load tensors in place ask for. Spaces fill it.
    """
    text = json.dumps(values).encode("ascii")
    while room < len(text):
        room *= 2
    return torch.tensor(list(text.ljust(room)), dtype=torch.float32)


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
