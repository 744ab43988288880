"""What a module's ``state_dict`` holds, and how it is loaded: all of it, or nothing.

Beside ``weights.<table>`` there are ``state.<table>.prev_iter`` and the optimizer's arrays, such as
``state.<table>.momentum1`` (contiguous copies), ``clock``, ``epoch_start``, ``lr`` (float64, one per param
group) and, as ``_extra_state``, the policies as plain values. A checkpoint whose shapes, dtypes or
policies differ is refused. Other policies are accepted, and the module's own stay, with
``load_state_dict(..., strict=False)`` on the module itself or, inside a larger model (torch does not tell
its parts about ``strict``), with ``module.strict_policies = False``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coldrow._checks import LAST_STEP

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
    module: TableBatchedEmbeddingBags, saved: Any, prefix: str
) -> Iterator[str]:
    """Yield how a checkpoint's policies differ from the module's. (lr is loaded, not compared.)"""
    own = policies(module)
    if not isinstance(saved, Mapping) or not isinstance(saved.get("update"), Mapping):
        yield f"{prefix}_extra_state: got {saved!r}, accepted: policies such as {own}"
        return

    def without_lr(update: Any) -> Any:
        if not isinstance(update, Mapping) or not isinstance(update.get("optimizer"), Mapping):
            return update
        return {**update, "optimizer": {**update["optimizer"], "lr": None}}

    for table, update in own["update"].items():
        theirs = saved["update"].get(table)
        if without_lr(theirs) != without_lr(update):
            yield f"update of '{table}': got {theirs}, accepted: the module's, {update}"
    if saved.get("charge") != module.charge:
        yield f"charge: got {saved.get('charge')!r}, accepted: the module's, {module.charge!r}"


def _problems(
    module: TableBatchedEmbeddingBags, state_dict: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    """Yield all that speaks against loading ``state_dict``."""
    own = _own_tensors(module)
    wanted = {f"weights.{name}": p for name, p in module.weights.items()} | own
    fits = True
    for key, target in wanted.items():
        given = state_dict.get(prefix + key, target)
        if not isinstance(given, Tensor):
            fits = False
            got = type(given).__name__
        elif given.shape != target.shape or given.dtype != target.dtype:
            fits = False
            got = f"{given.dtype} {list(given.shape)}"
        else:
            continue
        yield f"{prefix}{key}: got {got}, accepted: {target.dtype} {list(target.shape)}"
    compare = module.strict_policies and module._load_strict is not False
    if compare and prefix + "_extra_state" in state_dict:
        yield from _policy_differences(module, state_dict[prefix + "_extra_state"], prefix)
    if not fits:
        return
    for key in ("clock", "epoch_start"):
        value = int(state_dict.get(prefix + key, own[key]))
        if not 0 <= value <= LAST_STEP:
            yield f"{prefix}{key}: got {value}, accepted: 0 to 2**31 - 1"
    lr = state_dict.get(prefix + "lr", own["lr"])
    if not bool((lr.isfinite() & (lr >= 0)).all()):
        yield f"{prefix}lr: got {lr.tolist()}, accepted: finite numbers >= 0"
    clock = int(state_dict.get(prefix + "clock", own["clock"]))
    for table in module.state:
        key = f"state.{table}.prev_iter"
        touched = state_dict.get(prefix + key, own[key])
        low, high = int(touched.min()), int(touched.max())
        if low < 0 or high > clock:
            yield f"{prefix}{key}: got {low} to {high}, accepted: 0 to the clock, {clock}"


def load(
    module: TableBatchedEmbeddingBags,
    state_dict: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> bool:
    """Load what :func:`save` saved and take it away, or refuse all of it, weights included.

    Returns whether torch may go on with the rest (weights and extra state).
    """
    own = _own_tensors(module)
    weights = {f"weights.{name}": p.detach() for name, p in module.weights.items()}
    known = {prefix + key for key in (*weights, *own, "_extra_state")}
    missing = [key for key in sorted(known) if key not in state_dict]
    unexpected = [key for key in state_dict if key.startswith(prefix) and key not in known]
    problems = list(_problems(module, state_dict, prefix))
    # None: part of a larger model. Then torch loads what is there and raises for the rest if strict.
    strict = module._load_strict is True
    if problems or (strict and (missing or unexpected)):
        error_msgs += problems
        if strict:
            missing_keys += missing
            unexpected_keys += unexpected
        for key in (*own, *(key.removeprefix(prefix) for key in unexpected)):
            state_dict.pop(prefix + key, None)
        # The weights' submodule loads from this dict next: let it load what it has.
        state_dict.update({prefix + key: weight for key, weight in weights.items()})
        return False
    for key, target in own.items():
        given = state_dict.pop(prefix + key, None)
        if given is None:
            missing_keys.append(prefix + key)
        elif key == "lr":
            module._set_group_lrs(given.tolist())
        else:
            target.copy_(given)
    module._epoch_declared = module.epoch_start != 0
    return True
