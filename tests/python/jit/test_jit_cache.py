"""The folder of compiled policies: nobody else's code, nothing damaged, nothing left by those killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from sources import HALF_LIFE

import coldrow
from coldrow.jit import compiler, decay

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files to somebody else")
SOMEBODY = 65534


def make(half_life=2.0):
    compiler.forget()
    return decay("HalfLife", HALF_LIFE, half_life=half_life)


def built(cache):
    (library,) = cache.glob("*/policy-*.so")
    return library


def names(cache):
    """What is in a cache, but empty lock files."""
    return sorted(p.name for p in cache.iterdir() if not p.name.startswith("lock-"))


# ------------------------------------------------------------------------------------- whose it is


@root
@pytest.mark.parametrize("what", ["the folder", "the library", "all"])
def test_what_another_user_made_is_not_run(what, own_cache):
    make()
    library = built(own_cache)
    for path in {"the folder": [library.parent], "the library": [library]}.get(
        what, [library, library.parent]
    ):
        os.chown(path, SOMEBODY, SOMEBODY)
    with pytest.raises(PermissionError, match=r"^COLDROW_JIT_CACHE: '.*' was made by another user"):
        make()
    shutil.rmtree(library.parent)
    make()


@pytest.mark.parametrize("mode", [0o720, 0o702])
@pytest.mark.parametrize("what", ["folder", "library", "cache"])
def test_what_others_can_write_to_is_not_run(what, mode, own_cache):
    make()
    library = built(own_cache)
    {"folder": library.parent, "library": library, "cache": own_cache}[what].chmod(mode)
    with pytest.raises(
        PermissionError, match=r"^COLDROW_JIT_CACHE: .* can be written (to )?by others"
    ):
        make()


def test_whatever_the_umask_is(own_cache):
    before = os.umask(0)
    try:
        make()
    finally:
        os.umask(before)
    for path in [own_cache, *own_cache.rglob("*")]:
        assert not path.stat().st_mode & 0o022, path
    make()


def test_links_are_not_followed(own_cache, tmp_path):
    make()
    library = built(own_cache)
    (tmp_path / "there").mkdir()
    library.parent.rename(tmp_path / "there" / "build")
    library.parent.symlink_to(tmp_path / "there" / "build")
    make()
    assert not library.parent.is_symlink()
    kept = tmp_path / "precious"
    kept.write_text("precious")
    for lock in own_cache.glob("lock-*"):
        lock.unlink()
        lock.symlink_to(kept)
    with pytest.raises(OSError, match="lock-"):
        make()
    assert kept.read_text() == "precious"


# ------------------------------------------------------------------------------------------- damage


DAMAGE = {
    "empty": lambda library: library.write_bytes(b""),
    "cut off": lambda library: os.truncate(library, 3000),
    "zeros": lambda library: library.write_bytes(bytes(library.stat().st_size)),
    "one bit": lambda library: library.write_bytes(
        (data := library.read_bytes())[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
    ),
    "gone": lambda library: library.unlink(),
    "no folder": lambda library: (shutil.rmtree(library.parent), library.parent.write_text("x")),
    "a pipe": lambda library: (library.unlink(), os.mkfifo(library)),
    "two": lambda library: shutil.copy2(library, library.with_name(f"policy-{'0' * 32}.so")),
}
FRESH = f"""
import coldrow
coldrow.jit.decay("HalfLife", {HALF_LIFE!r}, half_life=3.0)
"""


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_built_again(damage, own_cache):
    make()
    library = built(own_cache)
    whole = library.read_bytes()
    # (In a process of its own: this one has the library mapped, and would die where it is cut off.)
    copy = library.with_suffix(".copy")
    shutil.copy2(library, copy)
    copy.rename(library)
    DAMAGE[damage](library)
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", FRESH], check=False).returncode == 0
    assert built(own_cache).read_bytes() == whole
    assert names(own_cache) == [library.parent.name]


def test_a_build_is_on_the_disk_before_it_is_seen(own_cache, monkeypatch):
    done, fsync, rename = [], os.fsync, os.rename

    def synced(file):
        done.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", lambda *paths: (done.append("rename"), rename(*paths)))
    make()
    assert done == ["sync policy.so", "rename", "sync build", "rename", f"sync {own_cache.name}"]


# ------------------------------------------------------------------------------------------- kills


def test_what_a_kill_leaves_is_bounded_and_goes(own_cache, tmp_path, monkeypatch):
    script = tmp_path / "cxx"
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    script.write_text(
        f'#!/bin/sh\ncase " $* " in *" -E "*) exec "{real}" "$@" ;; esac\n'
        f'[ -e "{tmp_path}/go" ] && exec "{real}" "$@"\ntouch "{tmp_path}/there"\nexec sleep 60\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", FRESH], start_new_session=True) as child:
            while not (tmp_path / "there").exists():
                assert child.poll() is None
                time.sleep(0.01)
            os.killpg(child.pid, signal.SIGKILL)
        (tmp_path / "there").unlink()
        assert len(names(own_cache)) == 1
    (tmp_path / "go").touch()
    make()
    (name,) = names(own_cache)
    assert not name.startswith("building-")


def test_many_policies_leave_few_files(own_cache):
    """Locks and folders of what is under way are 32 at most; a build is one folder with one file."""
    compiler.forget()
    for k in range(40):
        source = f"struct Own {{ float operator()(std::int32_t, float) const {{ return 0.{k + 1}f; }} }};"
        decay("Own", source)
    assert len(names(own_cache)) == 40
    assert len([*own_cache.glob("lock-*")]) <= 32
    assert all(len([*folder.iterdir()]) == 1 for folder in own_cache.iterdir() if folder.is_dir())


def test_threads_that_make_the_same_and_others(own_cache):
    made, errors = [], []
    compiler.forget()

    def run(k):
        source = f"struct Own {{ float operator()(std::int32_t, float) const {{ return 0.{1 + k % 3}f; }} }};"
        try:
            made.append(decay("Own", source))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(made)) == 3
    assert len(names(own_cache)) == 3


@root
def test_a_cache_that_cannot_be_written_to(own_cache):
    """It serves what it has. (As somebody else: root may write anywhere.)"""
    make()
    shutil.copytree(own_cache, other := own_cache.with_name("other"))
    for path in [other, *other.rglob("*")]:
        os.chown(path, SOMEBODY, SOMEBODY)
    for lock in other.glob("lock-*"):
        lock.unlink()
    other.chmod(0o500)
    for part in other.parents:
        if part.owner() == "root" and not part.stat().st_mode & 0o001:
            part.chmod(part.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(SOMEBODY)
            os.setuid(SOMEBODY)
            os.environ["COLDROW_JIT_CACHE"] = str(other)
            make(3.0)
            try:
                coldrow.jit.decay(
                    "HalfLife", HALF_LIFE + "\n// other\n" + "int other;", half_life=1
                )
            except PermissionError as error:
                code = 0 if "cannot be written to and does not have" in str(error) else 2
        except BaseException as error:
            print(type(error), error, file=sys.stderr, flush=True)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
