"""The manual is true: its code runs, its commands are understood, and what is made from the package is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.made_parts import made_parts
from helpers.pages import PAGES, README, blocks, has_python, run_python
from helpers.repository import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import peft_reslora_cli

# The block of one needs two YAML files of the reader's, with which tests/experiments runs it; those of the other
# stand for themselves, see test_upstream.py.
RUN = [page for page in PAGES if page.name not in ("experiments.md", "upstream.md")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small Llama in `base`, in which a page's code runs."""
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, vocab_size=100)
    LlamaForCausalLM(config).save_pretrained("base")
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a page's reader is warned of, most pages say
@pytest.mark.parametrize("page", [page for page in RUN if has_python(page, None)], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, workplace: Path):
    run_python(page, slow=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [page for page in RUN if has_python(page, "slow")], ids=lambda page: page.stem)
def test_the_slow_python_of_a_page_runs(page: Path, workplace: Path):
    run_python(page, slow=True)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_understood(page: Path):
    parser = peft_reslora_cli.build_parser()
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.commands()]
    for line in lines:
        program, *arguments = line.split()
        if program == "peft-reslora":
            assert parser.parse_args(arguments).run is not None


@pytest.mark.parametrize(
    ("page", "name"),
    [(page, name) for page in PAGES for name in re.findall(r"^<!-- made: (.+?) -->$", page.read_text("utf-8"), re.M)],
    ids=lambda value: value if isinstance(value, str) else value.stem,
)
def test_what_is_made_is_up_to_date(page: Path, name: str):
    """`PYTHONPATH=tests python -m helpers.made_parts` makes it anew."""
    (written, wanted) = next((text, made) for part, text, made in made_parts(page) if part == name)
    assert written.split() == wanted.split()


def test_every_block_of_code_is_seen():
    """A fence in a list or quotation would not be; nor would a comment with another wording hold a block back."""
    for page in [README, *PAGES]:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall(r"^[ >]*```\w+", text, re.M)) == len(blocks(page))
        assert text.count("<!-- not run: ") + text.count("<!-- slow: ") == sum(
            b.mark is not None for b in blocks(page)
        )


def test_every_link_leads_somewhere():
    for page in [README, *PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
            place = page.parent / target if target else page
            assert "://" in target or place.exists(), f"{page.name} links to {target}"
            assert not anchor or "://" in target or anchor in anchors(place), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
