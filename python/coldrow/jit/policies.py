"""Decays and optimizers whose formula is C++ given as text."""

from __future__ import annotations

import ctypes
import itertools
import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from coldrow._checks import number
from coldrow.jit import compiler
from coldrow.jit.compiler import CompileError
from coldrow.jit.wrapper import wrapped
from coldrow.policies import Decay, Optimizer, restored_by

_NAME = re.compile(r"[A-Za-z_]\w*(::[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class _Source:
    """A struct in C++, where it came from, and what was compiled of it."""

    kind: str
    name: str
    text: str
    path: str | None = field(compare=False)  # of the header it was read from
    fields: tuple[str, ...]  # those that are given
    identity: str  # of what decides its code
    included: str  # what checkpoints know of files that it includes
    library: ctypes.CDLL = field(compare=False, repr=False)

    @classmethod
    def of(
        cls, kind: str, name: str, source: str | os.PathLike[str], fields: tuple[str, ...]
    ) -> _Source:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"name: got {name!r}, accepted: the name of a C++ struct")
        if isinstance(source, os.PathLike):
            path = os.path.abspath(os.fsdecode(source))
            return cls.read(kind, name, _text(path), path, fields)
        if not isinstance(source, str):
            raise TypeError(
                f"source: got {source!r}, accepted: C++ as a str, or a path to a header"
            )
        return cls.read(kind, name, source, None, fields)

    @classmethod
    def read(
        cls, kind: str, name: str, text: str, path: str | None, fields: tuple[str, ...]
    ) -> _Source:
        """Compile what was read, or find it compiled."""
        file = "coldrow_policy.hpp" if path else name.replace("::", ".")
        try:
            made = compiler.library(wrapped(kind, name, file, fields), text, file, path, fields)
        except CompileError as error:
            raise _explained(name, path or file, error) from None
        if kind == "optimizer":
            _check_states(name, made.library)
        return cls(kind, name, text, path, fields, made.identity, made.included, made.library)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Source.read, (self.kind, self.name, self.text, self.path, self.fields)

    def __deepcopy__(self, memo: Any) -> _Source:
        return self


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"source: got {path!r}, which is no UTF-8 ({error.reason} at byte "
                         f"{error.start}), accepted: C++ in UTF-8") from None  # fmt: skip


def _check_states(name: str, library: ctypes.CDLL) -> None:
    """Refuse names of states that cannot be told apart, or could not be keys of a state_dict."""
    get = library.coldrow_state_name
    get.restype = ctypes.c_char_p
    seen = ["prev_iter"]
    for i in range(ctypes.c_int.in_dll(library, "coldrow_states").value):
        given = get(i)
        text = given.decode("utf-8", "replace") if given is not None else None
        if text is None or not text.isascii() or not text.isidentifier() or text in seen:
            others = ", ".join(map(repr, seen))
            raise ValueError(
                f"{name}: state_name({i}) is {text!r}, accepted: a C++ name other than {others}"
            )
        seen.append(text)


def _explained(struct: str, mine: str, error: CompileError) -> Exception:
    """Return what to raise: in our words where they are known, else with the compiler's."""
    if isinstance(error, compiler.MissingFieldsError):
        if "<anonymous>" in error.names:  # all that g++ says of it
            return TypeError(
                f"{struct}: has a base class, whose fields may not all be set, accepted: fields of the struct "
                "itself, or a constructor that sets them"
            )
        return TypeError(f"{struct}: field {error.names[0]!r} has no default and was not given")
    message = str(error).replace("\u2018", "'").replace("\u2019", "'")
    unknown = re.search(r"has no field '(\w+)'", message)
    missing = re.search(r"does not initialize '[^']*\b(\w+)'", message)
    # One block per error, with the lines before it that say where from. Those in the user's own
    # lines tell most; else the first is the cause of the rest.
    error_line = r"^(.+?):\d+:\d+: (?:fatal )?error"
    starts = [match.start() for match in re.finditer(error_line, message, re.MULTILINE)][1:]
    blocks = [message[i:j] for i, j in itertools.pairwise([0, *starts, len(message)])]
    own = [b for b in blocks if (at := re.search(error_line, b, re.M)) and at.group(1) == mine]
    if not own and re.search(rf"'{struct}'.*does not name a type|no type named", blocks[0]):
        return CompileError(f"name: got {struct!r}, accepted: a struct that the source defines")
    if not own and unknown:
        return TypeError(f"{struct} has no field {unknown.group(1)!r}")
    if not own and missing:
        which = f"field {missing.group(1)!r}" if missing.group(1) else "a field"
        return TypeError(f"{struct}: {which} has no default and was not given")
    clang = "default initialization of an object of const type", "is not initialized"
    if not own and any(says in message for says in clang):
        return TypeError(f"{struct}: a field has no default and was not given")
    asserted = re.search(
        r"static assertion failed(?: due to requirement '.*?')?: (.*)"
        r"|static_assert failed(?: due to requirement '.*?')? \"(.*)\"",  # clang++ before 16
        blocks[0],
    )
    first = (asserted[1] or asserted[2]) if asserted and not own else f"{struct} does not compile"
    return CompileError(first + ". The compiler says:\n" + "".join(own or blocks[:1]).rstrip())


_Params = tuple[tuple[str, "float | int"], ...]


def _values(params: Mapping[str, Any]) -> _Params:
    for name, value in params.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"params: got {name!r}, accepted: names of the struct's fields")
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise TypeError(f"{name}: got {value!r}, accepted: a finite number") from None
        if not finite:
            raise ValueError(f"{name}: got {value!r}, accepted: a finite number")
    return tuple((name, _exact(value)) for name, value in params.items())


def _exact(value: Any) -> float | int:
    """Return a number as a float; as an int where that would be another number."""
    try:
        whole = operator.index(value)
    except TypeError:
        return float(value)
    return whole if float(whole) != whole else float(whole)


class _Number(ctypes.Structure):
    """``Number`` of the wrapper (wrapper.py)."""

    _fields_ = (
        ("real", ctypes.c_double),
        ("magnitude", ctypes.c_ulonglong),
        ("sign", ctypes.c_int),
    )

    @classmethod
    def of(cls, value: float | int) -> _Number:
        if isinstance(value, int) and abs(value) < 2**64:
            return cls(float(value), abs(value), 1 if value > 0 else -1)
        return cls(float(value), 0, 0)


class _Compiled:
    """What compiled policies have in common."""

    source: _Source
    params: _Params

    def _functions(self) -> tuple[int, bytes]:
        """Return the address of the functions and the struct's bytes."""
        lib = self.source.library
        policy = ctypes.create_string_buffer(ctypes.c_int.in_dll(lib, "coldrow_policy_size").value)
        given = dict(self.params)
        values = [_Number.of(given[name]) for name in self.source.fields]
        wrong = lib.coldrow_bind((_Number * max(1, len(values)))(*values), policy)
        if wrong >= 0:
            name = self.source.fields[wrong]
            raise ValueError(
                f"{name}: got {given[name]!r}, accepted: a value that the field can hold"
            )
        address = ctypes.addressof(ctypes.c_char.in_dll(lib, "coldrow_functions"))
        return address, policy.raw

    def __getattr__(self, name: str) -> float | int:
        if not name.startswith("__"):
            for param, value in self.__dict__.get("params", ()):
                if param == name:
                    found: float | int = value
                    return found
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        values = [f"{name}={value!r}" for name, value in self._repr_values()]
        return f"{self.source.name}({', '.join(values)})"

    def _repr_values(self) -> _Params:
        return self.params

    def described(self) -> dict[str, Any]:
        """Return plain values, for checkpoints."""
        return {
            "policy": type(self).__name__,
            "name": self.source.name,
            "source": self.source.text,
            **({"included": self.source.included} if self.source.included else {}),
            "params": dict(self._repr_values()),
        }


@dataclass(frozen=True, repr=False)
class JitDecay(_Compiled, Decay):
    """A decay made by :func:`coldrow.jit.decay`."""

    source: _Source
    params: _Params

    def native(self) -> dict[str, Any]:
        """Return the struct's bytes, and where its functions are."""
        address, policy = self._functions()
        return {
            "decay": self.source.name,
            "decay_fields": policy,
            "decay_functions": address,
        }


@dataclass(frozen=True, repr=False)
class JitOptimizer(_Compiled, Optimizer):
    """An optimizer made by :func:`coldrow.jit.optimizer`."""

    source: _Source
    params: _Params
    lr: float = 0.01

    def native(self) -> dict[str, Any]:
        """Return the struct's bytes, and where its functions are."""
        address, policy = self._functions()
        return {
            "optimizer": self.source.name,
            "optimizer_fields": policy,
            "optimizer_functions": address,
        }

    def _repr_values(self) -> _Params:
        return (("lr", self.lr), *self.params)


# What this process made: the sources that a checkpoint may name, and the paths they were read from.
_made: dict[tuple[str, str, str, str], str | None] = {}

_P = TypeVar("_P", bound=_Compiled)


def _checked(policy: _P) -> _P:
    policy._functions()  # says what is wrong now rather than in the first step
    source = policy.source
    _made[source.kind, source.name, source.text, source.included] = source.path
    return policy


def _names(values: _Params) -> tuple[str, ...]:
    return tuple(sorted(name for name, _ in values))


def decay(name: str, source: str | os.PathLike[str], **params: float) -> JitDecay:
    """Compile a decay schedule of your own.

    Args:
        name: the struct.
        source: C++ that defines it, or the path of a header that does: a plain struct with
            ``COLDROW_HD float operator()(std::int32_t gap, float lr) const`` that returns a factor in
            [0, 1], 1 for a gap of 0; ``prepare`` and ``first_touch`` are optional
            (``coldrow/policy/decay.hpp``).
        **params: values of its fields, by name. A field that has no default must be given.

    Returns:
        A decay: equal to another of the same source and values, and picklable.

    Raises:
        CompileError: with the compiler's message, which points at the lines of ``source``.
        RuntimeError: if there is no compiler, or ``COLDROW_JIT=off``.
        TypeError, ValueError: a name or value that is not accepted.
    """
    values = _values(params)
    return _checked(JitDecay(_Source.of("decay", name, source, _names(values)), values))


def optimizer(
    name: str, source: str | os.PathLike[str], *, lr: float = 0.01, **params: float
) -> JitOptimizer:
    """Compile an optimizer of your own.

    Args:
        name: the struct.
        source: C++ that defines it, or the path of a header that does: a plain struct with
            ``scalar_states``, ``vector_states``, ``row()`` and ``element()``
            (``coldrow/policy/optimizer.hpp``); ``state_name``, ``prepare`` and ``elements_finite`` are
            optional.
        lr: initial learning rate, >= 0.
        **params: values of its fields, by name. A field that has no default must be given.

    Returns:
        An optimizer: equal to another of the same source and values, and picklable.

    Raises:
        CompileError: with the compiler's message, which points at the lines of ``source``.
        RuntimeError: if there is no compiler, or ``COLDROW_JIT=off``.
        TypeError, ValueError: a name or value that is not accepted.
    """
    values, rate = _values(params), number("lr", lr)
    made = _Source.of("optimizer", name, source, _names(values))
    return _checked(JitOptimizer(made, values, rate))


def restored(described: Mapping[str, Any]) -> _Compiled:
    """Return the policy that ``described()`` described, if this process has made one of its source.

    A checkpoint's code is never run on the checkpoint's word.
    """
    kind = "decay" if described["policy"] == "JitDecay" else "optimizer"
    name, text, included = described["name"], described["source"], described.get("included", "")
    try:
        path = _made[kind, name, text, included]
    except KeyError:
        raise ValueError(
            f"policy: got {name!r}, compiled from source; accepted: call "
            f"coldrow.jit.{kind}() with the same source first (code in a checkpoint is not run)"
        ) from None
    params = dict(described["params"])
    rate = number("lr", params.pop("lr")) if kind == "optimizer" else 0.0
    values = _values(params)
    source = _Source.read(kind, name, text, path, _names(values))
    if source.included != included:
        raise ValueError(
            f"policy: got {name!r}, of which files that {path!r} includes have changed since; accepted: call "
            f"coldrow.jit.{kind}() again and load a checkpoint of that policy"
        )
    return JitDecay(source, values) if kind == "decay" else JitOptimizer(source, values, rate)


restored_by("JitDecay", restored)
restored_by("JitOptimizer", restored)
