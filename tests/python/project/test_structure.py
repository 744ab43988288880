"""No import circles in the package, no use of another file's private names, no file without end."""

from __future__ import annotations

from pathlib import Path

import pytest
from structure import Package, too_long

ROOT = Path(__file__).parents[3]


def package(folder: Path, files: dict[str, str]) -> Package:
    """A package ``fake`` of these files."""
    for name, text in files.items():
        path = folder / "fake" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in [folder / "fake", *(p for p in (folder / "fake").rglob("*") if p.is_dir())]:
        (path / "__init__.py").touch()
    return Package(folder / "fake", others={"fake": {"_parameters"}, "fake.bridge": {"_theirs"}})


# ---------------------------------------------------------------------------------------- circles

CIRCLES = {
    "at the top": {"a.py": "from fake.b import f", "b.py": "import fake.a"},
    "of relative imports": {"a.py": "from .b import f", "b.py": "from . import a"},
    "within a function": {
        "a.py": "from fake import b",
        "b.py": "def f():\n    from fake.a import g",
    },
    "for types alone": {
        "a.py": "from fake import b",
        "b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from fake.a import A",
    },
    "by a string": {
        "a.py": "from fake import b",
        "b.py": "import importlib\nimportlib.import_module('fake.a')",
    },
    "of three": {
        "a.py": "from fake import b",
        "b.py": "from fake import c",
        "c.py": "from fake import a",
    },
    "with the package around it": {"__init__.py": "from fake import a", "a.py": "import fake"},
    "through another package": {
        "a.py": "from fake.sub.table import Table",
        "sub/__init__.py": "from fake.sub.layer import Layer",
        "sub/layer.py": "from fake.a import f",
        "sub/table.py": "",
    },
}
NO_CIRCLES = {
    "a package and its files": {
        "__init__.py": "from fake.a import f",
        "a.py": "from fake.b import f",
        "b.py": "",
    },
    "files beside each other": {
        "sub/__init__.py": "from fake.sub.a import f",
        "sub/a.py": "from fake.sub import b",
        "sub/b.py": "",
    },
    "native modules": {"__init__.py": "from fake import a", "a.py": "from fake import _core"},
    "other packages": {"a.py": "import torch\nfrom torch import nn", "torch.py": "import fake.a"},
}


@pytest.mark.parametrize("case", CIRCLES)
def test_a_circle_is_found(case, tmp_path):
    (found,) = package(tmp_path, CIRCLES[case]).circles()
    assert "fake/a.py:" in found
    assert len(found.splitlines()) >= 3  # what it is, and at least two imports


@pytest.mark.parametrize("case", NO_CIRCLES)
def test_no_circle_is_found(case, tmp_path):
    assert package(tmp_path, NO_CIRCLES[case]).circles() == []


def test_each_circle_is_reported_with_its_imports(tmp_path):
    files = CIRCLES["at the top"] | {
        "c.py": "from fake.d import f\n",
        "d.py": "\nfrom fake import c",
    }
    assert package(tmp_path, files).circles() == [
        "circle of 2:\nfake/a.py:1 fake.a imports fake.b\nfake/b.py:1 fake.b imports fake.a",
        "circle of 2:\nfake/c.py:1 fake.c imports fake.d\nfake/d.py:2 fake.d imports fake.c",
    ]


# ---------------------------------------------------------------------------------- private names

OWN = """\
from typing import NamedTuple

_limit = 3
class Table:
    __slots__ = ("_slot",)
    _field: int = 0
    def __init__(self):
        self._rows = 1
        object.__setattr__(self, "_frozen", 2)
        self.register_buffer("_clock", None)
    def _check(self): ...
class Pair(NamedTuple):
    _first: int
def _helper(table):
    return (table._rows, table._slot, table._field, table._frozen, table._clock, Pair(1)._first,
            table._check(), table.__dict__)
"""
USES = {
    "an attribute": ("def f(t):\n    return t._rows", ["fake/b.py:2 _rows of fake.a"]),
    "of self": (
        "class B:\n    def f(self):\n        self._check()",
        ["fake/b.py:3 _check of fake.a"],
    ),
    "a chain over lines": (
        "def f(t):\n    (t\n     ._rows\n     .x)",
        ["fake/b.py:3 _rows of fake.a"],
    ),
    "one that is set": ("def f(t):\n    t._rows = 1", ["fake/b.py:2 _rows of fake.a"]),
    "one that is deleted": ("def f(t):\n    del t._slot", ["fake/b.py:2 _slot of fake.a"]),
    "by a string": ("def f(t):\n    getattr(t, '_field', 0)", ["fake/b.py:2 _field of fake.a"]),
    "set by a string": (
        "def f(t):\n    object.__setattr__(t, '_frozen', 0)",
        ["fake/b.py:2 _frozen of fake.a"],
    ),
    "a name imported": ("from fake.a import _helper", ["fake/b.py:1 _helper of fake.a"]),
    "a name of a module": ("from fake import a\na._limit", ["fake/b.py:2 _limit of fake.a"]),
    "an override": (
        "from fake.a import Table\nclass B(Table):\n    def _check(self): ...",
        ["fake/b.py:3 _check of fake.a, overridden by B"],
    ),
    "an override through a module": (
        "import fake.a\nclass B(fake.a.Table):\n    _field = 1",
        ["fake/b.py:3 _field of fake.a, overridden by B"],
    ),
    "an override of what is set": (
        "from fake.a import Table as T\nclass B(T):\n    def f(self):\n        self._rows = 2",
        ["fake/b.py:4 _rows of fake.a, overridden by B"],
    ),
    "another library's": (
        "def f(x):\n    return x._hidden",
        ["fake/b.py:2 _hidden of no file here"],
    ),
    "another library's, listed elsewhere": (
        "def f(x):\n    return x._theirs",
        ["fake/b.py:2 _theirs of no file here"],
    ),
}
NO_USES = {
    "its own": {"a.py": OWN},
    "another class's of the same file": {
        "a.py": "class A:\n    _x = 1\nclass B(A):\n    _x = 2\n    def f(self, a): return a._x"
    },
    "a mark of its own on foreign objects": {
        "a.py": "def mark(p):\n    p._fake_fused = True\ndef is_marked(p):\n    return p._fake_fused"
    },
    "modules": {
        "a.py": "import fake\nfrom fake import _checks, _core\nfake._checks.f()\nfake._core.f()",
        "_checks.py": "",
    },
    "what is listed": {
        "a.py": "def f(module):\n    return module._parameters",
        "bridge.py": "def f(x):\n    return x._theirs",
    },
    "names that are public": {
        "a.py": "import enum\ndef f(e):\n    return e._value_, e.__class__, _"
    },
    "an override of another library's": {
        "a.py": "class A:\n    def _parameters(self): ...",
        "b.py": "from fake.a import A\nclass B(A):\n    def _parameters(self): ...",
    },
}


@pytest.mark.parametrize("case", USES)
def test_a_private_use_is_found(case, tmp_path):
    text, found = USES[case]
    assert package(tmp_path, {"a.py": OWN, "b.py": text}).private_uses() == found


@pytest.mark.parametrize("case", NO_USES)
def test_own_private_names_are_allowed(case, tmp_path):
    assert package(tmp_path, NO_USES[case]).private_uses() == []


def test_an_override_is_found_through_a_package_and_a_class_between(tmp_path):
    files = {
        "sub/base.py": "class Base:\n    def _hook(self): ...",
        "sub/__init__.py": "from fake.sub.base import Base",
        "a.py": "from fake.sub import Base\nclass Between(Base[int]): ...",
        "b.py": "from fake.a import Between\nclass Last(Between):\n    def _hook(self): ...",
    }
    found = package(tmp_path, files).private_uses()
    assert found == ["fake/b.py:3 _hook of fake.sub.base, overridden by Last"]


def test_a_mark_of_another_file_is_a_use(tmp_path):
    files = {
        "a.py": "def f(p):\n    p._mark = 1",
        "b.py": "def f(p):\n    return hasattr(p, '_mark')",
    }
    assert package(tmp_path, files).private_uses() == ["fake/b.py:2 _mark of fake.a"]


# ------------------------------------------------------------------------------------------ length


def test_a_file_that_is_too_long_is_found(tmp_path):
    package(tmp_path, {"a.py": "1\n" * 3, "sub/b.py": "1\n" * 4})
    assert too_long(tmp_path / "fake", 3, tmp_path) == ["fake/sub/b.py: 4 lines, accepted: 3"]


# -------------------------------------------------------------------------------- this repository


def test_no_test_file_is_too_long():
    found = too_long(ROOT / "tests", 700, ROOT)
    assert not found, "\n" + "\n".join(found)


COLDROW = ROOT / "python" / "coldrow"


def test_no_module_imports_itself_through_others():
    found = Package(COLDROW, ROOT).circles()
    assert not found, "\n" + "\n".join(found)


def test_no_file_uses_private_names_of_another():
    found = Package(COLDROW, ROOT).private_uses()
    assert not found, f"{len(found)} uses\n" + "\n".join(found)


def test_no_file_of_the_package_is_too_long():
    found = too_long(COLDROW, 600, ROOT)
    assert not found, "\n" + "\n".join(found)
