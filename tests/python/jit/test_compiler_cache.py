"""Policies compiled from source: compiled once for all processes, kept, and built anew when needed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from sources import ADAGRAD, HALF_LIFE, same_bits, train

import coldrow
from coldrow import _core
from coldrow.jit import CompileError, compiler, decay, optimizer

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A compiler that leaves a line in a file for each time it compiles (and does not only preprocess)."""
    log, script = tmp_path / "calls", tmp_path / "cxx"
    (real, *_), _ = compiler._compiler(os.environ.get("CXX"))
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -E "*) ;; *) echo called >>"{log}" ;; esac\nexec "{real}" "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))

    def calls():
        return len(log.read_text().splitlines()) if log.exists() else 0

    return calls


def fresh(code: str, count: int = 1):
    """Run code in new processes, all at once."""
    code = "import coldrow, sys\nsource = sys.stdin.read()\n" + textwrap.dedent(code)
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    for run in runs:
        run.stdin.write(HALF_LIFE)
    for run in runs:
        run.stdin.close()
    assert [run.wait(timeout=120) for run in runs] == [0] * count


def test_compiled_once_for_all_processes(own_cache, counted):
    fresh("coldrow.jit.decay('HalfLife', source, half_life=2.0)", count=8)
    assert counted() == 1
    fresh("coldrow.jit.decay('HalfLife', source, half_life=4.0)")  # another value, the same code
    assert counted() == 1
    assert [p.name for p in own_cache.iterdir() if p.name.startswith("building-")] == []
    assert len([p for p in own_cache.iterdir() if p.is_dir()]) == 1


def test_compiled_once_for_all_threads(own_cache, counted):
    coldrow.jit.compiler.forget()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: decay("HalfLife", HALF_LIFE, half_life=2.0), range(8)))
    assert len(set(made)) == 1
    assert counted() == 1


def test_flags_and_included_files_count(own_cache, counted, tmp_path):
    header, constant = tmp_path / "own.hpp", tmp_path / "constant.hpp"
    header.write_text(
        '#include "constant.hpp"\nstruct Own {\n'
        "  COLDROW_HD float operator()(std::int32_t, float) const { return kFactor; }\n};\n"
    )

    def factor():
        coldrow.jit.compiler.forget()
        coldrow.policies.compiled.cache_clear()
        update = coldrow.policies.compiled(coldrow.RowUpdate(decay=decay("Own", header)))
        return _core.factor(update, 1, 5, 0.1, 0, False)

    constant.write_text("inline constexpr float kFactor = 0.5f;\n")
    assert (factor(), counted()) == (0.5, 1)
    assert (factor(), counted()) == (0.5, 1)
    constant.write_text("inline constexpr float kFactor = 0.25f;\n")
    assert (factor(), counted()) == (0.25, 2)
    assert (factor(), counted()) == (0.25, 2)


def test_broken_build_is_built_again(own_cache, counted):
    def build():
        coldrow.jit.compiler.forget()
        decay("HalfLife", HALF_LIFE, half_life=2.0)

    build()
    for library in own_cache.glob("*/policy-*.so"):
        library.unlink()
    build()
    assert counted() == 2
    for library in own_cache.glob("*/policy-*.so"):
        library.rename(library.with_name("other.so"))
    build()
    assert counted() == 3


CLANG = next(
    filter(None, map(shutil.which, ["clang++", *(f"clang++-{n}" for n in range(25, 13, -1))])), None
)


@pytest.mark.skipif(CLANG is None, reason="needs clang++")
def test_clang(monkeypatch, own_cache):
    def update():
        return coldrow.RowUpdate(
            optimizer("Copy", ADAGRAD), decay("HalfLife", HALF_LIFE, half_life=7.0)
        )

    expected, by_gcc = train(update()), update()
    monkeypatch.setenv("CXX", CLANG)
    coldrow.jit.compiler.forget()
    coldrow.policies.compiled.cache_clear()
    assert update() != by_gcc
    assert same_bits(train(update()), expected)
    more = HALF_LIFE.replace("half_life;", "half_life; double scale;").replace(
        "gap)", "gap * scale)"
    )
    with pytest.raises(TypeError, match=r"^HalfLife: a field has no default and was not given"):
        decay("HalfLife", more, scale=1.0)
    assert decay("HalfLife", more, scale=1.0, half_life=2.0).scale == 1.0
    with pytest.raises(
        TypeError, match=r"^HalfLife: (field 'half_life'|a field) has no default and was not given"
    ):
        decay("HalfLife", HALF_LIFE)
    with pytest.raises(TypeError, match=r"^HalfLife has no field 'half_live'"):
        decay("HalfLife", HALF_LIFE, half_live=1.0)
    with pytest.raises(CompileError, match=r"^name: got 'Other'"):
        decay("Other", HALF_LIFE)
