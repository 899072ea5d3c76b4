"""Rows are read, checked and cut; what is damaged is refused with file, row and column."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from helpers.tiny_runs import write_films

from peft_reslora.experiments import hub_rows
from peft_reslora.experiments.data import Data, class_labels, load_data, numbers, read_file
from peft_reslora.experiments.settings import DataSettings, HubData

FILES = {"train": "train.tsv", "test": "test.tsv"}


def load(folder: Path, **changes: object) -> Data:
    settings = DataSettings(folder=str(folder), files=FILES, text=["sentence"], label="label", validation_rows=40)
    return load_data(replace(settings, **changes), ["sentence", "label"])


def replace_row(folder: Path, number: int, row: str, file: str = "train.tsv") -> None:
    lines = (folder / file).read_text(encoding="utf-8").splitlines()
    lines[number] = row
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_all_formats_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": "x, y", "b": "1"}, {"a": "z", "b": "2"}]
    (tmp_path / "d.csv").write_text('a,b\n"x, y",1\nz,2\n', encoding="utf-8")
    (tmp_path / "d.tsv").write_text("a\tb\nx, y\t1\nz\t2\n", encoding="utf-8")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "d.parquet"))
    for name in ("d.csv", "d.tsv", "d.jsonl", "d.parquet"):
        assert read_file(tmp_path / name) == rows


def test_splits_do_not_overlap_and_are_the_same_each_time(tmp_path: Path) -> None:
    folder = write_films(tmp_path)
    data, again = load(folder), load(folder, train_rows=50)
    assert data.sizes() == {"train": 120, "validation": 40, "test": 40}
    train, validation = data.splits["train"], data.splits["validation"]
    assert sorted(train.numbers + validation.numbers) == list(range(1, 161))
    assert again.splits["train"].numbers == train.numbers[:50]
    assert again.splits["validation"].numbers == validation.numbers
    assert set(data.checksums) == {"train", "test"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("only one cell", r"train.tsv, row 3: 1 cells, the header has 3"),
        ("\t1\t1.0", r"train.tsv, row 3, column 'sentence': empty"),
        ("words\t7\t1.0", r"train.tsv, row 3, column 'label': label 7 is out of range; 3 classes are numbered 0 to 2"),
    ],
)
def test_damaged_rows_are_refused_with_file_row_and_column(tmp_path: Path, row: str, message: str) -> None:
    folder = write_films(tmp_path)
    replace_row(folder, 3, row)
    with pytest.raises(ValueError, match=message):
        class_labels(load(folder, validation_rows=None).splits, "label")


def test_a_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_films(tmp_path)
    replace_row(folder, 2, "words\tnew\t1.0", "test.tsv")
    with pytest.raises(ValueError, match=r"test.tsv, row 2, column 'label': label 'new' is out of range"):
        class_labels(load(folder).splits, "label")


def test_an_empty_split_and_a_missing_column_are_refused(tmp_path: Path) -> None:
    folder = write_films(tmp_path)
    (folder / "test.tsv").write_text("sentence\tlabel\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"test.tsv has no rows"):
        load(folder)
    (folder / "test.tsv").write_text("sentence\tlable\nwords\t1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"test.tsv, row 1, column 'label': no such column; there are sentence"):
        load(folder)


def test_a_missing_file_names_the_override(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train.tsv is not a file; data.folder=DIR says"):
        load(tmp_path)


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = write_films(tmp_path)
    replace_row(folder, 5, "words\t1\tnan")
    with pytest.raises(ValueError, match=r"train.tsv, row 5, column 'score': 'nan' is no finite number"):
        numbers(load(folder, validation_rows=None).splits["train"], "score")


def test_the_hub_gives_the_same_rows_under_its_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the Hub: its columns are renamed, its splits mapped, and `folder` goes before it."""
    folder = write_films(tmp_path)
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Dataset:
        asked.append((name, config, split))
        rows = read_file(folder / ("train.tsv" if split == "train" else "test.tsv"))
        return Dataset.from_list(rows).rename_column("label", "target")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    hub = HubData("glue", "sst2", test="validation", rename={"target": "label"})
    in_hub = DataSettings(hub=hub, text=["sentence"], label="label", validation_rows=40)
    local, from_hub = load(folder, hub=hub), load_data(in_hub, ["sentence", "label"])
    assert asked == [("glue", "sst2", "train"), ("glue", "sst2", "validation")]
    assert {n: s.rows for n, s in local.splits.items()} == {n: s.rows for n, s in from_hub.splits.items()}
    assert from_hub.splits["test"].place(0, "label").startswith("glue/sst2:validation, row")
    assert set(from_hub.checksums) == {"train", "test"}


@pytest.mark.parametrize("answers", [True, False])
def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache alone is looked through, and the message says how files are read instead."""

    class Session:
        def head(self, *_: object, **__: object) -> None:
            if not answers:
                raise TimeoutError

    def load_dataset(*_: object, **__: object) -> None:
        offline.append(datasets.config.HF_HUB_OFFLINE)
        raise ConnectionError

    offline: list[bool] = []
    monkeypatch.setattr(hub_rows, "get_session", Session)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    settings = DataSettings(hub=HubData("org/films"), text=["sentence"], label="label")
    with pytest.raises(ValueError, match=r"org/films is not in the cache and the Hub cannot be.*data\.folder="):
        load_data(settings, ["sentence", "label"])
    assert offline == [not answers]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_a_missing_test_split_is_cut_from_training(tmp_path: Path) -> None:
    folder = write_films(tmp_path)
    data = load(folder, files={"train": "train.tsv"}, test_rows=30)
    assert data.sizes() == {"train": 90, "validation": 40, "test": 30}
    assert len({n for split in data.splits.values() for n in split.numbers}) == 160


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("d.tsv", b"a\tb\nx\ty\nx\t\xff\n", r"d.tsv, row 2, column 'b': no UTF-8"),
        ("d.csv", b'a,b\n"x, y",1\n\xe9,2\n', r"d.csv, row 2, column 'a': no UTF-8"),
        ("d.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"d.jsonl, row 2: no UTF-8"),
    ],
)
def test_a_file_that_is_no_utf8_is_refused_with_its_place(tmp_path: Path, name: str, text: bytes, place: str) -> None:
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=place):
        read_file(tmp_path / name)


def test_nan_is_no_class(tmp_path: Path) -> None:
    folder = write_films(tmp_path)
    rows = [{"sentence": "fine", "label": 1}, {"sentence": "dull", "label": float("nan")}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(ValueError, match=r"test.jsonl, row 2, column 'label': empty \(NaN\)"):
        load(folder, files={**FILES, "test": "test.jsonl"})


def test_splits_that_leave_nothing_to_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation_rows=100 and test_rows=60 leave none of its 160 rows to train"):
        load(write_films(tmp_path), files={"train": "train.tsv"}, validation_rows=100, test_rows=60)
