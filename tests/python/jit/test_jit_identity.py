"""Two policies compiled from source are one only if their code is: all that decides it counts."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import subprocess
import sys

import pytest

import coldrow
from coldrow import _core
from coldrow.jit import decay

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
OWN = (
    '#include "factor.hpp"\n'
    "struct Own {{ COLDROW_HD float operator()(std::int32_t, float) const {{ return {}; }} }};\n"
)


def factor(policy):
    update = coldrow.policies.compiled(coldrow.RowUpdate(decay=policy))
    return _core.factor(update, 1, 5, 0.1, 0, False)


def header(folder, value):
    folder.mkdir(exist_ok=True)
    (folder / "own.hpp").write_text(OWN.format("kFactor"))
    (folder / "factor.hpp").write_text(f"#pragma once\nconstexpr float kFactor = {value};\n")
    return folder / "own.hpp"


def test_headers_of_one_text_that_include_different_files(tmp_path):
    a, b = header(tmp_path / "a", "0.5f"), header(tmp_path / "b", "0.25f")
    one, other = decay("Own", a), decay("Own", b)
    assert (factor(one), factor(other)) == (0.5, 0.25)
    assert one != other
    assert hash(one) == hash(decay("Own", a))
    assert one == decay("Own", a)
    header(tmp_path / "a", "0.125f")
    edited = decay("Own", a)
    assert factor(edited) == 0.125
    assert factor(one) == 0.5  # made of what was there then
    assert edited != one


def test_what_a_file_that_is_included_includes(tmp_path):
    own = header(tmp_path / "a", "kOther")
    for value in ("0.5f", "0.25f"):
        (tmp_path / "a" / "factor.hpp").write_text('#include "deep.hpp"\nusing namespace deep;\n')
        text = f"namespace deep {{ constexpr float kFactor = {value}; }}\n"
        (tmp_path / "a" / "deep.hpp").write_text(text)
        assert factor(decay("Own", own)) == float(value[:-1])


def test_a_file_that_comes_first_from_now_on(tmp_path, monkeypatch):
    """Nothing that was read before has changed; another file is found."""
    source = OWN.format("kFactor").replace('"factor.hpp"', "<factor.hpp>")
    header(tmp_path / "late", "0.5f")
    (tmp_path / "early").mkdir()
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", f"{tmp_path}/early:{tmp_path}/late")
    assert factor(decay("Own", source)) == 0.5
    header(tmp_path / "early", "0.25f")
    assert factor(decay("Own", source)) == 0.25


@pytest.mark.parametrize("variable", ["CPATH", "CPLUS_INCLUDE_PATH"])
def test_the_environment(tmp_path, monkeypatch, variable):
    source = OWN.format("kFactor").replace('"factor.hpp"', "<factor.hpp>")
    for folder, value in (("a", "0.5f"), ("b", "0.25f")):
        header(tmp_path / folder, value)
        monkeypatch.setenv(variable, str(tmp_path / folder))
        assert factor(decay("Own", source)) == float(value[:-1])


def compiler_with(tmp_path, options):
    script = tmp_path / "cxx"
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    script.write_text(f'#!/bin/sh\nexec "{real}" {options} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_flags_of_the_compiler(tmp_path, monkeypatch):
    """In CXX, and in a program of that name, which is another when it is written anew."""
    plain = OWN.format("FACTOR").partition("\n")[2]
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    for value in ("0.5f", "0.25f"):
        monkeypatch.setenv("CXX", f"{real} -DFACTOR={value}")
        assert factor(decay("Own", plain)) == float(value[:-1])
    for value in ("0.125f", "0.0625f"):
        monkeypatch.setenv("CXX", compiler_with(tmp_path, f"-DFACTOR={value}"))
        assert factor(decay("Own", plain)) == float(value[:-1])


FRESH = """
import sys, pickle, coldrow
from coldrow import _core
with open(sys.argv[1], "rb") as file:
    policy = pickle.load(file)
print(_core.factor(coldrow.policies.compiled(coldrow.RowUpdate(decay=policy)), 1, 5, 0.1, 0, False))
"""


def test_in_another_process(tmp_path):
    """A pickled policy is compiled of what is there; the one in memory stays."""
    own = header(tmp_path / "a", "0.5f")
    policy = decay("Own", own)
    assert pickle.loads(pickle.dumps(policy)) == policy
    (tmp_path / "pickled").write_bytes(pickle.dumps(policy))
    command = [sys.executable, "-c", FRESH, str(tmp_path / "pickled")]
    assert subprocess.check_output(command, text=True).strip() == "0.5"
    header(tmp_path / "a", "0.25f")
    assert subprocess.check_output(command, text=True).strip() == "0.25"
    assert pickle.loads(pickle.dumps(policy)) != policy


def test_a_checkpoint_names_what_was_included(tmp_path):
    a, b = header(tmp_path / "a", "0.5f"), header(tmp_path / "b", "0.25f")
    updates = [coldrow.RowUpdate(decay=decay("Own", path)) for path in (a, b)]
    described = [update.to_dict() for update in updates]
    assert described[0] != described[1]
    assert [coldrow.RowUpdate.from_dict(d) for d in described] == updates
    header(tmp_path / "a", "0.125f")
    with pytest.raises(
        ValueError, match=r"^policy: got 'Own', of which files that '.*a/own.hpp' inc"
    ):
        coldrow.RowUpdate.from_dict(described[0])
    other = {**described[0]["decay"], "included": "0" * 32}
    with pytest.raises(
        ValueError, match=r"accepted: call coldrow.jit.decay\(\) with the same source"
    ):
        coldrow.RowUpdate.from_dict({**described[0], "decay": other})
    alone = decay("Own", OWN.format("0.5f").partition("\n")[2])
    assert "included" not in coldrow.RowUpdate(decay=alone).to_dict()["decay"]  # as 0.1.0 wrote it


def test_the_time_of_day_is_no_part_of_it(own_cache):
    source = OWN.format("sizeof(__TIME__) > 1 ? 0.5f : 0.25f").partition("\n")[2]
    made = []
    for zone in ("UTC", "Asia/Tokyo"):
        coldrow.jit.compiler.forget()
        os.environ["TZ"], before = zone, os.environ.get("TZ")
        try:
            made.append(decay("Own", source))
        finally:
            del os.environ["TZ"]
            if before is not None:
                os.environ["TZ"] = before
    assert made[0] == made[1]
    assert len([p for p in own_cache.iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize(
    "name", ["with space", "hash#", "dollar$", 'quote"', "back\\slash", "new\nline", "ü", "co:lon"]
)
def test_paths_of_any_kind(name, tmp_path):
    own = header(tmp_path / name, "0.5f")
    assert factor(decay("Own", own)) == 0.5
    other = own.rename(own.with_name(f"{name}.hpp"))
    assert factor(decay("Own", other)) == 0.5
    header(tmp_path / name, "0.25f")
    assert factor(decay("Own", other)) == 0.25
    own.write_text(own.read_text().replace("kFactor", "kFaktor"))
    with pytest.raises(coldrow.jit.CompileError, match=r"own.hpp:2:.*: error: .*kFaktor"):
        decay("Own", own)


def test_a_header_that_is_no_utf_8(tmp_path):
    own = header(tmp_path / "a", "0.5f")
    text = own.read_bytes()
    own.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert factor(decay("Own", own)) == 0.5
    own.write_bytes(b"// caf\xe9\n" + text)
    with pytest.raises(
        ValueError, match=r"^source: got '.*own.hpp', which is no UTF-8 \(.* at byte"
    ):
        decay("Own", own)
