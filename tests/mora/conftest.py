"""Settings for the tests of MoRA."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Squares are random in these tests, and the same in each run."""
    torch.manual_seed(0)
