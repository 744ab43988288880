"""What the ``state_dict`` of tables holds, and how it is loaded: all of it, or nothing.

Beside ``weights.<table>`` there are ``state.<table>.prev_iter`` and the arrays of the optimizer, such as
``state.<table>.momentum1``, ``clock``, ``epoch_start``, ``lr`` (float64, one per param group) and, as
``_extra_state``, the policies as text in a tensor. All but the last are the live parameters and buffers of the
module, so what an exponential moving average copies into them is there. A checkpoint whose shapes, dtypes or
policies differ is refused. Other policies are accepted, and those of the module stay, with
``load_state_dict(..., strict=False)`` on the module itself or, inside a larger model (torch does not tell
its parts about ``strict``), with ``module.strict_policies = False``. Checkpoints of coldrow 0.1.0, whose
``_extra_state`` is a dict, are loaded too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coldrow._checks import LAST_STEP, plain_array
from coldrow._described import plain_values


@dataclass(frozen=True)
class Target:
    """What a checkpoint is loaded into.

    Args:
        weights: tables by key.
        own: other live tensors by key: row state, ``clock``, ``epoch_start`` and ``lr``.
        policies: as plain values, ``{"update": {table: ...}, "charge": ...}``.
        compare_policies: refuse a checkpoint with other policies.
    """

    weights: Mapping[str, Tensor]
    own: Mapping[str, Tensor]
    policies: Mapping[str, Any]
    compare_policies: bool


def load(
    target: Target,
    state_dict: dict[str, Any],
    prefix: str,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    strict: bool,
    assign: bool,
) -> bool:
    """Load all but the weights and take it out of ``state_dict``, or refuse all of it, weights included.

    Args:
        target: what to load into.
        state_dict: what to load; what is loaded here is taken out.
        prefix: where its keys begin.
        missing_keys: keys that are not there are added.
        unexpected_keys: keys that mean nothing are added.
        error_msgs: what else is wrong is added.
        strict: a missing or unexpected key is wrong too.
        assign: weights will not be copied, but put in the place of the tables.

    Returns:
        Whether torch may go on with the rest (weights and extra state).
    """
    known = {prefix + key for key in (*target.weights, *target.own, "_extra_state")}
    missing = [key for key in sorted(known) if key not in state_dict]
    unexpected = [key for key in state_dict if key.startswith(prefix) and key not in known]
    problems = list(_problems(target, state_dict, prefix, assign=assign))
    if problems or (strict and (missing or unexpected)):
        error_msgs += problems
        if strict:
            missing_keys += missing
            unexpected_keys += unexpected
        for key in (*target.own, *(key.removeprefix(prefix) for key in unexpected)):
            state_dict.pop(prefix + key, None)
        # The weights' submodule loads from this dict next: let it load what it has.
        state_dict.update({prefix + key: weight for key, weight in target.weights.items()})
        return False
    for key, tensor in target.own.items():
        given = state_dict.pop(prefix + key, None)
        if given is None:
            missing_keys.append(prefix + key)
        else:
            tensor.copy_(given)
    return True


def _problems(
    target: Target, state_dict: Mapping[str, Any], prefix: str, *, assign: bool
) -> Iterator[str]:
    """Yield all that speaks against loading ``state_dict``."""
    fits = True
    for key, tensor in (*target.weights.items(), *target.own.items()):
        wrong = _misfit(key, state_dict.get(prefix + key, tensor), tensor)
        if wrong is not None:
            fits = False
            yield f"{prefix}{wrong}"
    if target.compare_policies and prefix + "_extra_state" in state_dict:
        yield from _policy_differences(target, state_dict[prefix + "_extra_state"], prefix)
    if not fits:
        return
    if assign:
        yield from _unassignable(target, state_dict, prefix)
    own = {key: state_dict.get(prefix + key, tensor) for key, tensor in target.own.items()}
    clock = int(own["clock"])
    for key, most in (("clock", LAST_STEP), ("epoch_start", clock + 1)):
        if not 0 <= int(own[key]) <= most:
            accepted = "2**31 - 1" if key == "clock" else f"the step after the clock, {most}"
            yield f"{prefix}{key}: got {int(own[key])}, accepted: 0 to {accepted}"
    lr = own["lr"]
    if not bool((lr.isfinite() & (lr >= 0)).all()):
        yield f"{prefix}lr: got {lr.tolist()}, accepted: finite numbers >= 0"
    for key, touched in own.items():
        if key.endswith(".prev_iter"):
            low, high = int(touched.min()), int(touched.max())
            if low < 0 or high > clock:
                yield f"{prefix}{key}: got {low} to {high}, accepted: 0 to the clock, {clock}"


def _misfit(key: str, given: Any, target: Tensor) -> str | None:
    """Return why ``given`` cannot be copied into ``target``, or None if it can."""
    accepted = f"accepted: {target.dtype} {list(target.shape)}"
    if not isinstance(given, Tensor):
        return f"{key}: got {type(given).__name__}, {accepted}"
    if given.is_meta:
        return f"{key}: got a tensor on the meta device, which has no values, {accepted}"
    try:
        plain_array(key, given, written=False)
    except (TypeError, ValueError) as error:
        return str(error)
    averaged = not target.is_floating_point() and given.is_floating_point()
    if given.shape != target.shape or not (given.dtype == target.dtype or averaged):
        return f"{key}: got {given.dtype} {list(given.shape)}, {accepted}"
    if averaged and not bool((given == given.round()).all()):
        return (
            f"{key}: got {given.dtype} that are no whole numbers (averaged over several checkpoints?), "
            f"{accepted}; keep those of the newest"
        )
    return None


def _unassignable(target: Target, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Yield which tensors cannot become tables as they are."""
    seen: dict[int, str] = {}
    for key, weight in target.weights.items():
        given = state_dict.get(prefix + key, weight)
        if not given.is_contiguous():
            yield (
                f"{prefix}{key}: got strides {list(given.stride())}, accepted with assign=True: a "
                "contiguous tensor"
            )
        if given.device != weight.device:
            yield (
                f"{prefix}{key}: is on {given.device}, accepted with assign=True: {weight.device}"
            )
        elif (first := seen.setdefault(given.data_ptr(), key)) != key:
            yield (
                f"{prefix}{key}: shares its memory with {prefix}{first}, accepted with assign=True: "
                "memory of its own"
            )


def _policy_differences(target: Target, saved: Any, prefix: str) -> Iterator[str]:
    """Yield how the policies of a checkpoint differ from those of the module. (lr is loaded, not compared.)"""
    own = target.policies
    try:
        saved = plain_values(saved)
    except ValueError as error:
        yield f"{prefix}_extra_state: {error}, accepted: policies such as {own}"
        return
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
    if saved.get("charge") != own["charge"]:
        yield f"charge: got {saved.get('charge')!r}, accepted: the module's, {own['charge']!r}"
