"""Settings for all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", action="store_true", help="print the table of what the collected tests show")


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--support-table"):
        from support import support_table

        sys.stdout.write(f"\n{support_table(session.items)}\n")


@pytest.fixture
def float64() -> Iterator[None]:
    """Models and inputs that the test makes are float64: rounding stays below `tolerances.FLOAT64`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
