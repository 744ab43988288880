"""Decays and optimizers whose formula is C++ given as text."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from coldrow._checks import number
from coldrow.jit.compiler import CompileError, library
from coldrow.policies import Decay, Optimizer, restored_by

_NAME = re.compile(r"[A-Za-z_]\w*(::[A-Za-z_]\w*)*")

_WRAPPER = """\
#include <{header}>
#include <limits>

#include "{file}"

namespace {{
using Policy = ::{name};
{checks}
// Whether a field of type T can hold the value. (A float is rounded.)
template <class T>
bool holds([[maybe_unused]] double x) {{
  if constexpr (std::is_integral_v<T>) {{
    return x >= static_cast<double>(std::numeric_limits<T>::min()) &&
           x < static_cast<double>(std::numeric_limits<T>::max()) + 1.0 && x == __builtin_trunc(x);
  }}
  return true;
}}
// Fields from numbers. Returns the number of a field that cannot hold its value, or -1.
int bind([[maybe_unused]] const double* values, void* policy) {{
{holds}
  {make}
  __builtin_memcpy(policy, &made, sizeof made);
  return -1;
}}
}}  // namespace

#define COLDROW_EXPORT extern "C" __attribute__((visibility("default")))
COLDROW_EXPORT const int coldrow_policy_size = sizeof(Policy);
COLDROW_EXPORT int coldrow_bind(const double* values, void* policy) {{ return bind(values, policy); }}
COLDROW_EXPORT const {functions} coldrow_functions = {functions}::of<Policy>();
"""

_FIELD = """\
template <class P>
concept Has_{f} = requires(P p) {{ p.{f}; }};
static_assert(Has_{f}<Policy>, "{name} has no field '{f}'");"""

_KINDS = {
    "decay": (
        "coldrow/policy/any_decay.hpp",
        "coldrow::ExternalDecay",
        'static_assert(coldrow::DecayPolicy<Policy>, "{name}: a decay is a trivially copyable struct '
        'with float operator()(std::int32_t gap, float lr) const");',
    ),
    "optimizer": (
        "coldrow/host/rows.hpp",
        "coldrow::host::OptimizerKernels",
        'static_assert(coldrow::OptimizerPolicy<Policy>, "{name}: an optimizer is a trivially copyable '
        "struct with scalar_states, vector_states, row() and element(), see "
        'coldrow/policy/optimizer.hpp");',
    ),
}


@dataclass(frozen=True)
class _Source:
    """A struct in C++ and where it came from."""

    kind: str
    name: str
    text: str
    path: str | None = field(compare=False)  # of the header it was read from

    @property
    def file(self) -> str:
        """The name of the file that the wrapper includes."""
        return os.path.basename(self.path) if self.path else self.name.replace("::", ".")

    @classmethod
    def of(cls, kind: str, name: str, source: str | os.PathLike[str]) -> _Source:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"name: got {name!r}, accepted: the name of a C++ struct")
        if isinstance(source, os.PathLike):
            path = os.path.abspath(source)
            with open(path, encoding="utf-8") as file:
                return cls(kind, name, file.read(), path)
        if not isinstance(source, str):
            raise TypeError(
                f"source: got {source!r}, accepted: C++ as a str, or a path to a header"
            )
        return cls(kind, name, source, None)


@functools.lru_cache(maxsize=256)
def _load(source: _Source, fields: tuple[str, ...]) -> ctypes.CDLL:
    header, functions, check = _KINDS[source.kind]
    # Designated initialisers come in the order of the struct's fields. The order in which the source
    # first names them is that order; where it is not, the compiler says so.
    code = re.sub(r"//.*?$|/\*.*?\*/", "", source.text, flags=re.DOTALL | re.MULTILINE)
    code = code[max(0, code.find(f"struct {source.name.rpartition('::')[2]}")) :]

    def place(name: str) -> int:
        found = re.search(rf"\b{name}\b", code)
        return found.start() if found else len(code)

    checks = [check.format(name=source.name)]
    checks += [_FIELD.format(f=f, name=source.name) for f in fields]
    types = {f: f"std::remove_cvref_t<decltype(Policy::{f})>" for f in fields}
    holds = "\n".join(
        f"  if (!holds<{types[f]}>(values[{i}])) return {i};" for i, f in enumerate(fields)
    )
    given = ", ".join(
        f".{f} = static_cast<{types[f]}>(values[{fields.index(f)}])"
        for f in sorted(fields, key=place)
    )
    wrapper = _WRAPPER.format(
        header=header,
        file=source.file,
        name=source.name,
        checks="\n".join(checks),
        holds=holds,
        # (A const object says whether all fields have a default.)
        make=f"const Policy made{{{given}}};" if fields else "const Policy made;",
        functions=functions,
    )
    try:
        return library(wrapper, source.text, source.file, source.path)
    except CompileError as error:
        raise _explained(source, str(error)) from None


def _explained(source: _Source, message: str) -> Exception:
    """Return what to raise: in our words where they are known, else with the compiler's."""
    message = message.replace("\u2018", "'").replace("\u2019", "'")
    unknown = re.search(r"has no field '(\w+)'", message)
    missing = re.search(
        r"missing initializer for member '(?:\w+::)*(\w+)'|missing field '(\w+)' initializer"
        r"|does not initialize '[^']*\b(\w+)'",
        message,
    )
    # One block per error, with the lines before it that say where from. Those in the user's own
    # lines tell most; else the first is the cause of the rest.
    error_line = r"^(\S+?):\d+:\d+: (?:fatal )?error"
    starts = [match.start() for match in re.finditer(error_line, message, re.MULTILINE)][1:]
    blocks = [message[i:j] for i, j in itertools.pairwise([0, *starts, len(message)])]
    mine = source.path or source.file
    own = [b for b in blocks if (at := re.search(error_line, b, re.M)) and at.group(1) == mine]
    if not own and re.search(rf"'{source.name}'.*does not name a type|no type named", blocks[0]):
        return CompileError(
            f"name: got {source.name!r}, accepted: a struct that the source defines"
        )
    if not own and unknown:
        return TypeError(f"{source.name} has no field {unknown.group(1)!r}")
    if not own and missing:
        name = next(group for group in missing.groups() if group)
        return TypeError(f"{source.name}: field {name!r} has no default and was not given")
    if not own and "default initialization of an object of const type" in message:  # clang
        return TypeError(f"{source.name}: a field has no default and was not given")
    asserted = re.search(r"static assertion failed[^:]*: (.*)", blocks[0])
    first = asserted.group(1) if asserted and not own else f"{source.name} does not compile"
    return CompileError(first + ". The compiler says:\n" + "".join(own or blocks[:1]).rstrip())


def _values(params: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    for name, value in params.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"params: got {name!r}, accepted: names of the struct's fields")
        try:
            finite = math.isfinite(value)
        except (TypeError, OverflowError):
            raise TypeError(f"{name}: got {value!r}, accepted: a finite number") from None
        if not finite:
            raise ValueError(f"{name}: got {value!r}, accepted: a finite number")
    return tuple((name, float(value)) for name, value in params.items())


class _Compiled:
    """What compiled policies have in common."""

    source: _Source
    params: tuple[tuple[str, float], ...]

    def _library(self) -> ctypes.CDLL:
        return _load(self.source, tuple(name for name, _ in self.params))

    def _functions(self) -> tuple[int, bytes]:
        """Return the address of the functions and the struct's bytes."""
        lib = self._library()
        policy = ctypes.create_string_buffer(ctypes.c_int.in_dll(lib, "coldrow_policy_size").value)
        values = (ctypes.c_double * max(1, len(self.params)))(*(v for _, v in self.params))
        wrong = lib.coldrow_bind(values, policy)
        if wrong >= 0:
            name, value = self.params[wrong]
            raise ValueError(f"{name}: got {value!r}, accepted: a value that the field can hold")
        address = ctypes.addressof(ctypes.c_char.in_dll(lib, "coldrow_functions"))
        return address, policy.raw

    def __getattr__(self, name: str) -> float:
        if not name.startswith("__"):
            for param, value in self.__dict__.get("params", ()):
                if param == name:
                    return float(value)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __repr__(self) -> str:
        values = [f"{name}={value!r}" for name, value in self._repr_values()]
        return f"{self.source.name}({', '.join(values)})"

    def _repr_values(self) -> tuple[tuple[str, float], ...]:
        return self.params

    def described(self) -> dict[str, Any]:
        """Return plain values, for checkpoints."""
        return {
            "policy": type(self).__name__,
            "name": self.source.name,
            "source": self.source.text,
            "params": dict(self._repr_values()),
        }


@dataclass(frozen=True, repr=False)
class JitDecay(_Compiled, Decay):
    """A decay made by :func:`coldrow.jit.decay`."""

    source: _Source
    params: tuple[tuple[str, float], ...]

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
    params: tuple[tuple[str, float], ...]
    lr: float = 0.01

    def native(self) -> dict[str, Any]:
        """Return the struct's bytes, and where its functions are."""
        address, policy = self._functions()
        return {
            "optimizer": self.source.name,
            "optimizer_fields": policy,
            "optimizer_functions": address,
        }

    def _repr_values(self) -> tuple[tuple[str, float], ...]:
        return (("lr", self.lr), *self.params)


# What this process made: the sources that a checkpoint may name.
_made: dict[tuple[str, str, str], _Source] = {}

_P = TypeVar("_P", bound=_Compiled)


def _checked(policy: _P) -> _P:
    policy._functions()  # compiles; says what is wrong now rather than in the first step
    source = policy.source
    _made[source.kind, source.name, source.text] = source
    return policy


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
    return _checked(JitDecay(_Source.of("decay", name, source), _values(params)))


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
    made = _Source.of("optimizer", name, source)
    return _checked(JitOptimizer(made, _values(params), number("lr", lr)))


def restored(described: Mapping[str, Any]) -> _Compiled:
    """Return the policy that ``described()`` described, if this process has made one of its source.

    A checkpoint's code is never run on the checkpoint's word.
    """
    kind = "decay" if described["policy"] == "JitDecay" else "optimizer"
    source = _made.get((kind, described["name"], described["source"]))
    if source is None:
        raise ValueError(
            f"policy: got {described['name']!r}, compiled from source; accepted: call "
            f"coldrow.jit.{kind}() with the same source first (code in a checkpoint is not run)"
        )
    params = dict(described["params"])
    if kind == "decay":
        return JitDecay(source, _values(params))
    lr = number("lr", params.pop("lr"))
    return JitOptimizer(source, _values(params), lr)


restored_by("JitDecay", restored)
restored_by("JitOptimizer", restored)
