"""The faults of PEFT that docs/upstream.md reports are still there; one that PEFT has mended leaves the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "upstream.md"
FAULTS: dict[str, str] = dict(
    re.findall(r"^### (.+?)$.*?^(```python$.+?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
)


def test_the_page_has_a_reproduction_for_every_fault() -> None:
    headings = re.findall(r"^### (.+)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(headings) >= 10
    assert list(FAULTS) == headings


@pytest.mark.filterwarnings("ignore")  # of PEFT, for what the blocks mean to do
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_peft_is_still_there(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "from hqq" in FAULTS[fault]:
        pytest.importorskip("hqq")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = FAULTS[fault].removeprefix("```python\n")
    assert "assert " in code or 'simplefilter("error")' in code
    exec(compile(code, f"docs/upstream.md: {fault}", "exec"), {"__name__": "reproduction"})
