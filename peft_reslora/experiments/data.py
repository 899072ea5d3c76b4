"""Rows of a data set: read from the Hub or from local files, checked, and cut into splits that never overlap."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_reslora.experiments.hub_rows import load_hub_split
from peft_reslora.experiments.settings import DataSettings, HubData
from peft_reslora.shared.host import fingerprint_of

SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    """The rows of one split, where they were read, and where each stands there (1 is the first row of data)."""

    source: str
    rows: list[Row]
    numbers: list[int]

    def place(self, index: int, column: str) -> str:
        return f"{self.source}, row {self.numbers[index]}, column {column!r}"


@dataclass(frozen=True)
class Data:
    """All splits, and by split the checksum of the file it was read from (of the Hub: its fingerprint)."""

    splits: dict[str, Split]
    checksums: dict[str, str]

    def sizes(self) -> dict[str, int]:
        return {name: len(split.rows) for name, split in self.splits.items()}


def load_data(settings: DataSettings, columns: Sequence[str], keep: Callable[[Row], bool] | None = None) -> Data:
    """Read what the settings name, refuse what is damaged, and cut the splits.

    Rows are shuffled with a fixed seed before they are cut, whatever the seed of the run: all runs see the same rows.
    A missing validation or test split is taken from the training rows: `validation_rows`, then `test_rows` of them.
    With `keep`, rows of which it is False do not count.

    Raises:
        ValueError: for missing files, empty splits, missing columns or cells, with file, row and column.
    """
    if settings.uuid_pairs is not None:
        return random_pairs(settings.uuid_pairs, columns)
    read, checksums = _read_files(settings) if settings.folder or not settings.hub else _read_hub(settings.hub)
    for split in read.values():
        check_rows(split, columns)
    kept = {name: _filtered(split, keep) for name, split in read.items()} if keep else read
    return Data(_cut(kept, settings), checksums)


def random_pairs(count: int, columns: Sequence[str]) -> Data:
    """Pairs of 32 random hexadecimal digits; every split holds all of them (MoRA, arXiv 2405.12130, section 3)."""
    draw = random.Random(0)
    key, value = columns[0], columns[1]
    split = number_rows("random pairs", [{key: _digits(draw), value: _digits(draw)} for _ in range(count)])
    checksum = hashlib.sha256(json.dumps(split.rows).encode()).hexdigest()
    return Data(dict.fromkeys(SPLITS, split), {"random pairs": checksum})


def _digits(draw: random.Random) -> str:
    return f"{draw.getrandbits(128):032x}"


def _read_files(settings: DataSettings) -> tuple[dict[str, Split], dict[str, str]]:
    if unknown := sorted(set(settings.files) - set(SPLITS)):
        raise ValueError(f"data.files has the unknown splits {unknown}; known are {', '.join(SPLITS)}.")
    if "train" not in settings.files:
        raise ValueError("data.files names no file for train.")
    folder = Path(settings.folder or ".").expanduser()
    paths = {name: folder / file for name, file in settings.files.items()}
    splits = {name: number_rows(str(path), read_file(path)) for name, path in paths.items()}
    return splits, {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def number_rows(source: str, rows: list[Row]) -> Split:
    return Split(source, rows, list(range(1, len(rows) + 1)))


def read_file(path: Path) -> list[Row]:
    """Read csv, tsv (no quoting), jsonl or parquet.

    Raises:
        ValueError: naming the file, and of a line that cannot be read its number.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path}: files are read as {', '.join(readers)}, by the end of their name.")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; data.folder=DIR says where the files of data.files are.")
    try:
        return readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{_first_bad_cell(path)}: no UTF-8 ({error.reason}); save the file as UTF-8.") from error


def _first_bad_cell(path: Path) -> str:
    """Place of the first byte that is no UTF-8; of a column only where its name is known."""
    raw = path.read_bytes()
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
    if path.suffix == ".jsonl":
        return f"{path}, row {before.count(chr(10)) + 1}"
    header, *rows = _cells(path, io.StringIO(f"{before}?", newline=""))
    column = f", column {header[len(rows[-1]) - 1]!r}" if rows and len(rows[-1]) <= len(header) else ""
    return f"{path}, row {len(rows)}{column}"


def _cells(path: Path, file: Iterable[str]) -> Iterator[list[str]]:
    """The cells of each line; those of a tsv are never quoted."""
    if path.suffix == ".tsv":
        return csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(file)


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = _cells(path, file)
        header = next(lines, [])
        rows = []
        for number, cells in enumerate(lines, start=1):
            if len(cells) != len(header):
                raise ValueError(f"{path}, row {number}: {len(cells)} cells, the header has {len(header)}.")
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    # Not splitlines, which also ends a line at signs such as U+2028, which JSON may hold within a string.
    for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}: no JSON ({error.msg} at character {error.pos}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: expected an object with a key for each column.")
        rows.append(row)
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from datasets import Dataset

    return list(with_image_files(Dataset.from_parquet(str(path))))


def _read_hub(hub: HubData) -> tuple[dict[str, Split], dict[str, str]]:
    way_out = "With a copy of its files: data.folder=DIR, and their names in data.files (csv, tsv, jsonl, parquet)."
    names = {"train": hub.train, "validation": hub.validation, "test": hub.test}
    splits, checksums = {}, {}
    for name, split in names.items():
        if split is not None:
            rows = with_image_files(load_hub_split(hub, split, way_out))
            source = f"{hub.name}{'/' + hub.config if hub.config else ''}:{split}"
            checksums[name] = fingerprint_of(rows)
            splits[name] = number_rows(source, list(rows.rename_columns(hub.rename) if hub.rename else rows))
    return splits, checksums


def with_image_files(rows: Any) -> Any:
    """A data set whose images are the bytes of their files, so that the row of one that is damaged can be said."""
    from datasets import Image

    for column, kind in (rows.features or {}).items():
        if isinstance(kind, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def check_rows(split: Split, columns: Sequence[str]) -> None:
    """Refuse an empty split, and rows without a value in one of the columns.

    Raises:
        ValueError: naming file, row and column.
    """
    if not split.rows:
        raise ValueError(f"{split.source} has no rows.")
    for index, row in enumerate(split.rows):
        for column in columns:
            if column not in row:
                raise ValueError(f"{split.place(index, column)}: no such column; there are {', '.join(row)}.")
            if row[column] is None or row[column] == "" or row[column] != row[column]:
                raise ValueError(f"{split.place(index, column)}: empty{' (NaN)' if row[column] else ''}.")


def _cut(read: Mapping[str, Split], settings: DataSettings) -> dict[str, Split]:
    splits = {name: _shuffled(split) for name, split in read.items()}
    if "validation" not in splits and settings.validation_rows:
        splits["validation"] = _part(splits["train"], 0, settings.validation_rows)
        splits["train"] = _part(splits["train"], settings.validation_rows, None)
    if "test" not in splits and settings.test_rows:
        splits["test"] = _part(splits["train"], 0, settings.test_rows)
        splits["train"] = _part(splits["train"], settings.test_rows, None)
    limits = {name: getattr(settings, f"{name}_rows") for name in SPLITS}
    splits = {name: _part(splits[name], 0, limits[name]) for name in SPLITS if name in splits}
    if not splits["train"].rows:
        raise ValueError(
            f"{splits['train'].source}: validation_rows={settings.validation_rows} and test_rows={settings.test_rows} "
            f"leave none of its {len(read['train'].rows)} rows to train."
        )
    return splits


def _part(split: Split, start: int, stop: int | None) -> Split:
    return Split(split.source, split.rows[start:stop], split.numbers[start:stop])


def _filtered(split: Split, keep: Callable[[Row], bool]) -> Split:
    chosen = [(row, number) for row, number in zip(split.rows, split.numbers, strict=True) if keep(row)]
    return Split(split.source, [row for row, _ in chosen], [number for _, number in chosen])


def _shuffled(split: Split) -> Split:
    order = list(range(len(split.rows)))
    random.Random(0).shuffle(order)
    return Split(split.source, [split.rows[i] for i in order], [split.numbers[i] for i in order])


def class_labels(splits: Mapping[str, Split], column: str) -> dict[str, int]:
    """The classes of the training split in order, as the text of their cells, with their indices.

    Raises:
        ValueError: if training has one class only, or another split has a class that training lacks: file, row,
            column.
    """
    train = splits["train"]
    names = sorted({str(row[column]) for row in train.rows}, key=lambda name: (not name.isdecimal(), len(name), name))
    if len(names) < 2:
        raise ValueError(f"{train.source}, column {column!r}: all training rows have the label {names[0]!r}.")
    if all(name.isdecimal() for name in names) and names != [str(i) for i in range(len(names))]:
        bad = next(i for i, row in enumerate(train.rows) if int(row[column]) >= len(names))
        raise ValueError(
            f"{train.place(bad, column)}: label {train.rows[bad][column]} is out of range; {len(names)} classes are "
            f"numbered 0 to {len(names) - 1}."
        )
    for split in splits.values():
        for index, row in enumerate(split.rows):
            if str(row[column]) not in names:
                raise ValueError(
                    f"{split.place(index, column)}: label {row[column]!r} is out of range; training has "
                    f"{', '.join(names[:20])}."
                )
    return {name: index for index, name in enumerate(names)}


def numbers(split: Split, column: str) -> list[float]:
    """A column as finite numbers.

    Raises:
        ValueError: naming file, row and column of the first cell that is none.
    """
    values = []
    for index, row in enumerate(split.rows):
        try:
            value = float(row[column])
        except (TypeError, ValueError):
            value = float("nan")
        if not abs(value) < float("inf"):
            raise ValueError(f"{split.place(index, column)}: {row[column]!r} is no finite number.")
        values.append(value)
    return values
