"""Settings for all tests."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: as many threads as workers would slow all down
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import peft_reslora_cli

if TYPE_CHECKING:
    from helpers.command import Done

pytest.register_assert_rewrite("helpers")  # before they are imported: a failing assertion there shows its values too
ALL_TESTS = pytest.StashKey[list[pytest.Item]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    for option in ("--support-table", "--layer-support-table"):
        parser.addoption(option, action="store_true", help="print the table of what the collected tests show")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[ALL_TESTS] = list(items)  # also those that `-m` leaves out
    for item in items:
        quick = [marker.kwargs for marker in item.iter_markers("quick")]
        if quick and not any(_has(item, values) for values in quick):
            item.add_marker(pytest.mark.slow)


def _has(item: pytest.Item, values: dict[str, list[Any]]) -> bool:
    """Whether each named parameter of the test has one of its `values`."""
    return all(item.callspec.params[name] in among for name, among in values.items())


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # collections need not look at what the imports made
    if session.config.getoption("--support-table"):
        from helpers.support import support_table

        sys.stdout.write(f"\n{support_table(session.config.stash[ALL_TESTS])}\n")
    if session.config.getoption("--layer-support-table"):
        from helpers.support import layer_support_table

        sys.stdout.write(f"\n{layer_support_table(session.config.stash[ALL_TESTS])}\n")


@pytest.fixture
def all_tests(request: pytest.FixtureRequest) -> list[pytest.Item]:
    """All that were collected, also those that `-m` leaves out."""
    return request.config.stash[ALL_TESTS]


@pytest.fixture
def float64() -> Iterator[None]:
    """Models and inputs that the test makes are float64: rounding stays below `tolerances.FLOAT64`."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Done]]:
    """Run `peft-reslora` in this process, and undo afterwards what it sets for the process."""
    from helpers.command import Done

    monkeypatch.setenv("OMP_WAIT_POLICY", os.environ["OMP_WAIT_POLICY"])

    def run(*argv: object) -> Done:
        capsys.readouterr()
        code: int | str | None
        try:
            code = peft_reslora_cli.main([str(arg) for arg in argv])
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        # The interpreter prints a message given to `sys.exit` and turns it into code 1.
        return Done(1, captured.out, captured.err + code) if isinstance(code, str) else Done(code, *captured)

    with warnings.catch_warnings():
        yield run
    logging.disable(logging.NOTSET)
