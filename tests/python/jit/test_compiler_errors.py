"""Policies compiled from source: what is refused, and what it says."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from sources import HALF_LIFE, RMSPROP

import coldrow
from coldrow.jit import CompileError, decay, optimizer

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def test_errors_point_at_the_users_lines(tmp_path):
    wrong = HALF_LIFE.replace("half_life * gap", "half_live * gap")
    with pytest.raises(CompileError, match=r"HalfLife:4:\d+: error: .*half_live") as caught:
        decay("HalfLife", wrong, half_life=1.0)
    assert "coldrow_wrapper.cpp:" not in str(caught.value).replace("from coldrow_wrapper.cpp:", "")
    header = tmp_path / "half_life.hpp"
    header.write_text("#pragma once\n" + wrong)
    with pytest.raises(CompileError, match=rf"{header}:5:\d+: error: .*half_live"):
        decay("HalfLife", header, half_life=1.0)


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: decay("Other", HALF_LIFE), CompileError, "^name: got 'Other', accepted: a struct that"),
        (lambda: decay("HalfLife", HALF_LIFE.replace("float op", "double op"), half_life=1.0),
         CompileError, r"^HalfLife: a decay is a trivially copyable struct with float operator\(\)"),
        (lambda: optimizer("HalfLife", HALF_LIFE, half_life=1.0), CompileError,
         "^HalfLife: an optimizer is a trivially copyable struct with scalar_states, vector_states"),
        (lambda: optimizer("Copy", RMSPROP.replace("scalar_states = 1", "scalar_states = 9"), eps=1, ema_beta=0),
         CompileError, "at most four scalar and four vector states"),
        (lambda: decay("Half Life", HALF_LIFE), ValueError, "^name: got 'Half Life', accepted: the name"),
        (lambda: decay("HalfLife", 3), TypeError, "^source: got 3, accepted: C\\+\\+ as a str, or a path"),
        (lambda: decay("HalfLife", HALF_LIFE, **{"half life": 1}), ValueError, "^params: got 'half life'"),
        (lambda: optimizer("Copy", RMSPROP, lr=-1, eps=0, ema_beta=0), ValueError, "^lr: got -1"),
    ],
)  # fmt: skip
def test_what_is_refused(make, kind, says):
    with pytest.raises(kind, match=says):
        make()


def test_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.hpp"):
        decay("HalfLife", tmp_path / "nothing.hpp")


def test_switch(monkeypatch):
    decay("HalfLife", HALF_LIFE, half_life=31.0)
    coldrow.jit.compiler.forget()
    monkeypatch.setenv("COLDROW_JIT", "off")
    with pytest.raises(RuntimeError, match=r"^COLDROW_JIT: is off"):
        decay("HalfLife", HALF_LIFE, half_life=31.0)


def test_no_compiler(monkeypatch, own_cache):
    coldrow.jit.compiler.forget()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        RuntimeError, match=r"^CXX: got 'no-such-compiler' and found no such program"
    ):
        decay("HalfLife", HALF_LIFE, half_life=1.0)


def test_import_needs_no_compiler(tmp_path):
    code = "import coldrow; coldrow.policies.compiled(coldrow.RowUpdate())"
    subprocess.run([sys.executable, "-c", code], env={"PATH": str(tmp_path)}, check=True)


def test_cache_that_others_can_write_to_is_refused(own_cache):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    coldrow.jit.compiler.forget()
    with pytest.raises(PermissionError, match="can be written by others"):
        decay("HalfLife", HALF_LIFE, half_life=1.0)


def test_cache_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("COLDROW_JIT_CACHE", str(tmp_path / "file" / "cache"))
    coldrow.jit.compiler.forget()
    with pytest.raises(OSError, match=r"^COLDROW_JIT_CACHE: cannot make"):
        decay("HalfLife", HALF_LIFE, half_life=1.0)
