"""What a module's ``state_dict`` holds, and how it is loaded: all of it, or nothing.

Beside ``weights.<table>`` there are ``state.<table>.prev_iter``, ``state.<table>.momentum1`` (contiguous
copies), ``clock``, ``epoch_start``, ``lr`` (float64, one per param group) and, as ``_extra_state``, the
policies as plain values. A checkpoint whose shapes, dtypes or policies differ is refused; with
``strict=False`` other policies are accepted and the module's own stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coldrow.functional import LAST_STEP

if TYPE_CHECKING:
    from coldrow.nn.module import TableBatchedEmbeddingBags


def _own_tensors(module: TableBatchedEmbeddingBags) -> dict[str, Tensor]:
    """Return what is saved beside the weights: live tensors by key, and lr as a copy."""
    tensors = {
        f"state.{table}.{name}": view
        for table, views in module.state.items()
        for name, view in views.items()
    }
    tensors["clock"] = module._clock
    tensors["epoch_start"] = module._epoch_start
    tensors["lr"] = module._group_lrs()
    return tensors


def save(module: TableBatchedEmbeddingBags, destination: dict[str, Any], prefix: str) -> None:
    """Add state, clock and learning rates to a state_dict."""
    for key, tensor in _own_tensors(module).items():
        destination[prefix + key] = tensor.clone(memory_format=torch.contiguous_format)


def policies(module: TableBatchedEmbeddingBags) -> dict[str, Any]:
    """Return the policies as plain values."""
    updates = {t.name: u.to_dict() for t, u in zip(module.tables, module._updates, strict=True)}
    return {"update": updates, "charge": module.charge}


def _policy_differences(
    module: TableBatchedEmbeddingBags, saved: Mapping[str, Any]
) -> Iterator[str]:
    """Yield how a checkpoint's policies differ from the module's. (lr is loaded, not compared.)"""

    def without_lr(update: Mapping[str, Any]) -> dict[str, Any]:
        optimizer = {k: v for k, v in update["optimizer"].items() if k != "lr"}
        return {**update, "optimizer": optimizer}

    for table, update in policies(module)["update"].items():
        theirs = saved.get("update", {}).get(table)
        if theirs is not None and without_lr(theirs) != without_lr(update):
            yield f"update of '{table}': got {theirs}, accepted: the module's, {update}"
    if saved.get("charge", module.charge) != module.charge:
        yield f"charge: got {saved['charge']!r}, accepted: the module's, {module.charge!r}"


def _problems(
    module: TableBatchedEmbeddingBags, state_dict: Mapping[str, Any], prefix: str, strict: bool
) -> Iterator[str]:
    """Yield all that speaks against loading ``state_dict``."""
    wanted = {f"weights.{name}": p for name, p in module.weights.items()} | _own_tensors(module)
    fits = True
    for key, target in wanted.items():
        given = state_dict.get(prefix + key)
        if given is None:
            continue
        if given.shape != target.shape or given.dtype != target.dtype:
            fits = False
            yield (
                f"{prefix}{key}: got {given.dtype} {list(given.shape)}, accepted: {target.dtype} "
                f"{list(target.shape)}"
            )
    if not fits:
        return
    clock = int(state_dict.get(prefix + "clock", module._clock))
    if not 0 <= clock <= LAST_STEP:
        yield f"{prefix}clock: got {clock}, accepted: 0 to 2**31 - 1"
    for table, views in module.state.items():
        key = f"{prefix}state.{table}.prev_iter"
        touched = state_dict.get(key, views["prev_iter"])
        low, high = int(touched.min()), int(touched.max())
        if low < 0 or high > clock:
            yield f"{key}: got {low} to {high}, accepted: 0 to the clock, {clock}"
    extra = state_dict.get(prefix + "_extra_state")
    if strict and isinstance(extra, Mapping):
        yield from _policy_differences(module, extra)


def load(
    module: TableBatchedEmbeddingBags,
    state_dict: dict[str, Any],
    prefix: str,
    strict: bool,
    missing_keys: list[str],
    error_msgs: list[str],
) -> bool:
    """Check everything, weights included, then load what :func:`save` saved, and take it away.

    Returns whether the rest (the weights) may be loaded.
    """
    problems = list(_problems(module, state_dict, prefix, strict))
    own = _own_tensors(module)
    if problems:
        error_msgs += problems
        # The weights' submodule loads from this dict afterwards: leave it nothing to load.
        for name in module.weights:
            state_dict.pop(f"{prefix}weights.{name}", None)
    for key, target in own.items():
        given = state_dict.pop(prefix + key, None)
        if problems:
            continue
        if given is None:
            missing_keys.append(prefix + key)
        elif key == "lr":
            module._set_group_lrs(given.tolist())
        else:
            target.copy_(given)
    return not problems
