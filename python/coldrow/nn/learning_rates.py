"""Learning rates of a module: one float64 tensor that the kernels read, seen by schedulers as param groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from coldrow._checks import number


class ParamGroup(dict[str, Any]):
    """A param group whose ``lr`` is a live 0-dim float64 tensor: assigning a number writes into it.

    So a new learning rate holds at once, also in a program that torch.compile made before.
    """

    def __init__(self, lr: Tensor) -> None:
        super().__init__(lr=lr, params=[])

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "lr":
            super().__setitem__(key, value)
        elif value is not self["lr"]:
            self["lr"].fill_(number("lr", value))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set several entries."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> ParamGroup:  # type: ignore[override,misc]
        self.update(other)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _group, (dict(self),)

    def follow(self, lr: Tensor) -> None:
        """Show another tensor as ``lr``; its value counts."""
        super().__setitem__("lr", lr)


def _group(entries: Mapping[str, Any]) -> ParamGroup:
    group = ParamGroup(entries["lr"])
    dict.update(group, entries)
    return group


class LearningRates:
    """The param groups over a tensor ``[groups]`` of learning rates, and the group of each table."""

    def __init__(self, lr: Tensor, of_table: Sequence[int]) -> None:
        self.of_table = list(of_table)
        self.param_groups = [ParamGroup(value) for value in lr.unbind()]

    def follow(self, lr: Tensor, parameters: Iterable[Tensor]) -> None:
        """Show the values of another tensor, and the tables whose learning rates they are."""
        for group, value in zip(self.param_groups, lr.unbind(), strict=True):
            group.follow(value)
            group["params"] = []
        for parameter, of in zip(parameters, self.of_table, strict=True):
            self.param_groups[of]["params"].append(parameter)

    def set(self, values: Iterable[float]) -> None:
        """Set the learning rates, checked, by group."""
        checked = [number("lr", value) for value in values]
        for group, value in zip(self.param_groups, checked, strict=True):
            group["lr"] = value
