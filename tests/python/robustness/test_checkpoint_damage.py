"""Checkpoint files that were damaged: one exception that names the file, and never other numbers."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import coldrow

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from coldrow import checkpoint  # noqa: E402
from coldrow.checkpoint import CheckpointError  # noqa: E402
from coldrow.nn import Table, TableBatchedEmbeddingBags  # noqa: E402

SUFFIXES = ["pt", "safetensors"]
EXAMPLES = int(os.environ.get("COLDROW_DAMAGES", "300"))  # of each kind of file


def trained():
    torch.manual_seed(0)
    update = coldrow.RowUpdate(
        coldrow.Adam(lr=0.1), coldrow.EpochGated(coldrow.CumulativeLinear(half_life=9.0))
    )
    emb = TableBatchedEmbeddingBags([Table("a", 16, 8), Table("b", 5, 2)], update, charge="read")
    emb.new_epoch()
    for _ in range(3):
        emb(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 4])).sum().backward()
    return emb.state_dict()


@pytest.fixture(scope="module")
def state():
    return trained()


def same(a, b):
    return set(a) == set(b) and all(
        torch.equal(x, b[k]) and x.dtype == b[k].dtype if isinstance(x, torch.Tensor) else x == b[k]
        for k, x in a.items()
    )


def refused_or_same(path, state):
    """What a damaged file may do. Returns whether it was refused."""
    said = None
    try:
        loaded = checkpoint.load(path)
    except CheckpointError as error:
        said = str(error)
    if said is not None:
        assert str(path) in said
        return True
    assert same(state, loaded)
    return False


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_bit_counts(suffix, state, tmp_path):
    """(Every 29th: all of them take minutes.)"""
    path = tmp_path / f"model.{suffix}"
    checkpoint.save(state, path)
    whole = path.read_bytes()
    assert same(state, checkpoint.load(path))
    for bit in range(random.Random(0).randrange(29), len(whole) * 8, 29):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        assert refused_or_same(path, state), f"bit {bit} of {len(whole) * 8}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_length_counts(suffix, state, tmp_path):
    path = tmp_path / f"model.{suffix}"
    checkpoint.save(state, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 41), *range(len(whole) - 90, len(whole))]:
        path.write_bytes(whole[:length])
        assert refused_or_same(path, state), f"{length} of {len(whole)} bytes"
    path.write_bytes(whole + b"\0")
    assert refused_or_same(path, state)


DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 1 << 20), st.integers(0, 7)),
        st.tuples(st.just("put"), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=64)),
        st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.integers(1, 200)),
        st.tuples(st.just("double"), st.integers(0, 1 << 20), st.integers(1, 200)),
        st.tuples(st.just("zero"), st.integers(0, 1 << 20), st.integers(1, 600)),
    ),
    min_size=1,
    max_size=4,
)


def damaged(whole, damage):
    data = bytearray(whole)
    for kind, at, what in damage:
        at %= max(1, len(data))
        if not data:
            continue
        if kind == "flip":
            data[at] ^= 1 << what
        elif kind == "put":
            data[at : at + len(what)] = what
        elif kind == "cut":
            del data[at : at + what]
        elif kind == "double":
            data[at:at] = data[at : at + what]
        else:
            data[at : at + what] = bytes(len(data[at : at + what]))
    return bytes(data)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_damage(suffix, state, tmp_path):
    path = tmp_path / f"model.{suffix}"
    checkpoint.save(state, path)
    whole = path.read_bytes()

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(DAMAGE)
    def run(damage):
        other = damaged(whole, damage)
        path.write_bytes(other)
        assert refused_or_same(path, state) == (other != whole)

    run()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_damage_of_a_file_without_a_digest(suffix, state, tmp_path):
    """Other numbers cannot be told there; other exceptions can."""
    path = tmp_path / f"model.{suffix}"
    write_as_0_1_0(state, path)
    whole = path.read_bytes()

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(DAMAGE)
    def run(damage):
        path.write_bytes(damaged(whole, damage))
        try:
            checkpoint.load(path)
        except CheckpointError as error:
            said = str(error)
        else:
            return
        assert str(path) in said

    run()


# ----------------------------------------------------------------------- files of others, and for others


def write_as_0_1_0(state, path):
    if path.suffix == ".pt":
        torch.save(dict(state), path)
        return
    tensors = {k: v.contiguous() for k, v in state.items() if isinstance(v, torch.Tensor)}
    plain = {k: v for k, v in state.items() if k not in tensors}
    safetensors_torch.save_file(tensors, path, {"coldrow.plain": json.dumps(plain)})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_without_a_digest_are_loaded(suffix, state, tmp_path):
    path = tmp_path / f"model.{suffix}"
    write_as_0_1_0(state, path)
    assert same(state, checkpoint.load(path))
    tensors = {"t": torch.arange(3)}
    if suffix == "pt":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)  # what torch 1.5 wrote
    else:
        safetensors_torch.save_file(tensors, path, {"format": "pt"})
    assert same(tensors, checkpoint.load(path))


def test_the_libraries_themselves_read_the_files(state, tmp_path):
    checkpoint.save(state, tmp_path / "model.pt")
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True, **options)
        assert same(dict(state), loaded)
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"coldrow.digest:1:")
    checkpoint.save(state, tmp_path / "model.safetensors")
    loaded = safetensors_torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(state[key], value) for key, value in loaded.items())
    assert set(loaded) == {k for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_verify(suffix, tmp_path):
    """Without it a file is read once, and taken as it is."""
    path = tmp_path / f"model.{suffix}"
    checkpoint.save({"t": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(3000)) + 1500] = 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"^{path}: is damaged: its digest is another one"):
        checkpoint.load(path)
    assert checkpoint.load(path, verify=False)["t"].count_nonzero() == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_more_than_one_part(suffix, tmp_path):
    """The digest is taken in parts of 16 MiB, by several threads."""
    path = tmp_path / f"model.{suffix}"
    state = {"t": torch.arange(9_000_000, dtype=torch.int32), "u": torch.ones(3)}
    checkpoint.save(state, path)
    assert path.stat().st_size > 2 * (1 << 24)
    assert same(state, checkpoint.load(path))
    for at in (1000, (1 << 24) + 5, (1 << 25) + 5):
        with path.open("rb+") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 4]))
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
        with path.open("rb+") as file:
            file.seek(at)
            file.write(byte)
    assert same(state, checkpoint.load(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04", b"PK\x03\x04" + bytes(200), bytes(8), struct.pack("<Q", 2) + b"{}",
     struct.pack("<Q", 1 << 60) + b"{", struct.pack("<Q", 5) + b"[1,2]", b"\x80\x02}q\x00.",
     struct.pack("<Q", 40_002) + b"[" * 20_001 + b"]" * 20_001, b"\xff" * 300],
)  # fmt: skip
def test_what_is_no_checkpoint(suffix, content, tmp_path):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    if suffix == "safetensors" and content == struct.pack("<Q", 2) + b"{}":
        assert checkpoint.load(path) == {}  # an empty one
        return
    with pytest.raises(CheckpointError, match=str(path)):
        checkpoint.load(path)


def test_a_file_of_something_else(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"it holds a list, accepted: a dict"):
        checkpoint.load(tmp_path / "list.pt")
    assert issubclass(CheckpointError, ValueError)
