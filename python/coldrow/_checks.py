"""One exception that names the argument: numbers, words, lists and arrays, checked.

Imports nothing of coldrow, and no torch.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

LAST_STEP = 2**31 - 1
MAX_DIM = 2**30
MAX_ELEMENTS = 2**60  # of a table: beyond them bytes do not count in 64 bits
ON_NONFINITE = ("skip", "raise", "propagate")
_LARGEST_FLOAT32 = 3.4028234e38


def item(value: Any) -> Any:
    """Return the number in a 0-dim array, or ``value``. (torch raises RuntimeError where there is none.)"""
    is_array = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_array else value


def number(
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = _LARGEST_FLOAT32,
    low_open: bool = False,
) -> float:
    """Return ``value`` as a float, or raise naming the argument, what was given and what is accepted."""

    def error() -> str:  # (A tensor's text takes longer than a step.)
        bounds = f"a number {'>' if low_open else '>='} {low:g}" + (
            f" and <= {high:.10g}" if high < _LARGEST_FLOAT32 else " and finite"
        )
        return f"{name}: got {value!r}, accepted: {bounds}"

    try:
        given = item(value)
        if isinstance(given, (bool, str, bytes)):
            raise TypeError(error())
        x = float(given)
    except OverflowError:
        raise ValueError(error()) from None
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ):  # RuntimeError: torch, of a tensor with more values
        raise TypeError(error()) from None
    if not (low <= x <= high) or (low_open and x == low):
        raise ValueError(error())
    return x


def table_key(table: int | str) -> int:
    """Return the 64-bit key of a table for stochastic rounding: a name is hashed, a number kept."""
    if isinstance(table, str):
        return int.from_bytes(hashlib.blake2b(table.encode(), digest_size=8).digest(), "little")
    return integer("table", table, 0, 2**64 - 1)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Return ``value`` as an int in [low, high], or raise naming the argument."""

    def error() -> str:  # (A tensor's text takes longer than a step.)
        return f"{name}: got {value!r}, accepted: an integer from {low} to {high}"

    try:
        given = item(value)
        if isinstance(given, bool):
            raise TypeError(error())
        whole = given.__index__()
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise TypeError(error()) from None
    if not low <= whole <= high:
        raise ValueError(error())
    return int(whole)


def one_of(name: str, given: Any, accepted: Sequence[Any]) -> Any:
    """Return ``given``, or raise unless it is among ``accepted``."""
    # (By type first: an array would compare element by element.)
    if not any(isinstance(given, type(a)) and given == a for a in accepted):
        raise ValueError(f"{name}: got {given!r}, accepted: {', '.join(map(repr, accepted))}")
    return given


def listed(name: str, given: Any, accepted: str) -> list[Any]:
    """Return the items of ``given``, or raise where it has none."""
    try:
        return list(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {given!r}, accepted: {accepted}") from None


def require_state_dict(given: Any) -> None:
    """Refuse what is no state_dict of an optimizer."""
    if not isinstance(given, Mapping) or "param_groups" not in given:
        got = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise TypeError(f"state_dict: got {got}, accepted: a mapping, as state_dict() returns it")


def require_dense(name: str, tensor: Any) -> None:
    """Refuse a torch tensor that is no array: sparse, nested, of another library's layout."""
    if tensor.layout != sys.modules["torch"].strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: got a tensor of layout {layout}, accepted: a dense tensor")


def torch_of(array: Any) -> Any:
    """Return the torch module if ``array`` is a torch tensor, else None; never imports torch."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else None


def plain_array(name: str, array: Any, *, written: bool) -> Any:
    """Refuse the torch tensors whose memory does not mean what it seems to."""
    torch = torch_of(array)
    if torch is None:
        return array
    require_dense(name, array)
    if type(array).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name}: got a {type(array).__name__} (a tensor subclass with its own dispatch), "
            "accepted: a plain tensor"
        )
    if array.is_neg() or array.is_conj():
        raise ValueError(
            f"{name}: is a lazily negated or conjugated view, accepted: a plain tensor "
            "(call .resolve_neg() / .resolve_conj())"
        )
    if array.numel() > 0:
        last = sum((n - 1) * s for n, s in zip(array.shape, array.stride(), strict=True))
        end = (array.storage_offset() + last + 1) * array.element_size()
        if (
            0 < array.untyped_storage().nbytes() < end
        ):  # one of none has no address, see take_array()
            raise ValueError(
                f"{name}: its storage has {array.untyped_storage().nbytes()} bytes, too few for "
                f"{list(array.shape)}, accepted: a tensor whose storage was not freed or resized"
            )
    if written and array.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires grad and would be changed behind autograd's back, accepted: a tensor "
            "that does not (pass .detach(), or call under torch.no_grad())"
        )
    return array.detach() if array.requires_grad else array
