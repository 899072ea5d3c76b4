"""Settings for all tests."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", action="store_true", help="print the table of what the collected tests show")


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--support-table"):
        from support import support_table

        sys.stdout.write(f"\n{support_table(session.items)}\n")
