"""Projects outside this repository find the headers, build and run, each of the documented ways."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import coldrow

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
OUTSIDE = HERE / "outside"

# The row as the outside program prints it, after a first touch and after one half-life.
PRINTED = ["1 -2 4", "0.5 -1 2", coldrow.__version__]

# Tools that pip installs beside the interpreter (ninja) count as installed.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

COMPILERS = [os.environ.get("CXX", "c++")]
CLANGS = ["clang++"] + [f"clang++-{n}" for n in range(30, 13, -1)]
if clang := next(filter(None, map(shutil.which, CLANGS)), None):
    COMPILERS.append(clang)


def call(*command: object) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_and_run(build: Path, *options: object) -> None:
    call("cmake", "-S", OUTSIDE, "-B", build, *options)
    call("cmake", "--build", build)
    assert call(build / "outside").split("\n")[:3] == PRINTED


def ask(*arguments: str) -> str:
    return call(sys.executable, "-m", "coldrow", *arguments).strip()


def test_from_the_wheel(tmp_path):
    build_and_run(tmp_path, f"-Dcoldrow_DIR={ask('--cmakedir')}")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_without_cmake(tmp_path, compiler):
    program = tmp_path / "outside"
    warnings = ("-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror")
    includes = f"-I{ask('--includes')}"
    sources = OUTSIDE.glob("*.cpp")
    call(compiler, "-std=c++20", "-O2", *warnings, includes, *sources, "-o", program)
    assert call(program).split("\n")[:3] == PRINTED


def test_from_an_installed_tree(tmp_path):
    # Nothing but a compiler is needed to install it, and the tree may be moved.
    absent = [f"-DCMAKE_DISABLE_FIND_PACKAGE_{p}=ON" for p in ("Python", "nanobind", "OpenMP")]
    call("cmake", "-S", REPOSITORY, "-B", tmp_path / "coldrow", *absent)
    call("cmake", "--build", tmp_path / "coldrow")
    call("cmake", "--install", tmp_path / "coldrow", "--prefix", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "second")
    build_and_run(tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'second'}")


def test_as_a_subdirectory(tmp_path):
    # SKBUILD is what scikit-build-core defines: a wheel of somebody else's is being built, and
    # nothing of coldrow belongs into it.
    build_and_run(tmp_path / "build", f"-DCOLDROW_SOURCE={REPOSITORY}", "-DSKBUILD=2")
    call("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    installed = [p for p in (tmp_path / "prefix").rglob("*") if p.is_file()]
    assert installed == [tmp_path / "prefix/bin/outside"]


MAJOR, MINOR, PATCH = (int(n) for n in coldrow.__version__.split("."))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (f"{MAJOR}.{MINOR}", 1),
        (coldrow.__version__, 1),
        (f"{MAJOR}.{MINOR}.{PATCH + 1}", 0),
        (f"{MAJOR}.{MINOR + 1}", 0),
        (f"{MAJOR}.{MINOR - 1}" if MINOR else f"{MAJOR - 1}.0", 0),
        (f"{MAJOR + 1}.0", 0),
    ],
)
def test_a_wrong_version_is_refused(tmp_path, wanted, found):
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(find NONE)\n"
        f"find_package(coldrow {wanted} CONFIG)\n"
        'message(STATUS "found ${coldrow_FOUND} of ${coldrow_CONSIDERED_VERSIONS}")\n'
    )
    said = call(
        *("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-Dcoldrow_DIR={ask('--cmakedir')}")
    )
    assert f"found {found} of {coldrow.__version__}" in said


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_strict_reaches_cuda(tmp_path):
    call(
        *("cmake", "-S", OUTSIDE, "-B", tmp_path, "-DWITH_CUDA=ON"),
        *("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-Dcoldrow_DIR={ask('--cmakedir')}"),
    )
    call("cmake", "--build", tmp_path, "--target", "kernel")
    commands = {
        Path(c["file"]).name: c["command"]
        for c in json.loads((tmp_path / "compile_commands.json").read_text())
    }
    assert "-fmad=false" in commands["kernel.cu"]
    assert "-Xcompiler=-ffp-contract=off" in commands["kernel.cu"]
    assert "-ffp-contract=off" in commands["main.cpp"]
    assert "-fmad" not in commands["main.cpp"]


@pytest.mark.parametrize("site_packages", ["true", "false"])
def test_from_scikit_build_core(tmp_path, site_packages):
    """Without a hint: by its search of site-packages, or by the entry points alone."""
    pytest.importorskip("scikit_build_core")
    project = shutil.copytree(HERE / "outside_wheel", tmp_path / "project")
    call(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("-C", f"search.site-packages={site_packages}", "-w", tmp_path, project),
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {Path(name).parts[0] for name in archive.namelist()} == {
            "outside",
            "outside-1.0.dist-info",
        }
        archive.extractall(tmp_path / "installed")
    code = "import outside; print(outside.shrink(6, 0.5, 0.25))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True
    )
    assert done.stdout.strip() == "0.25", done.stderr
