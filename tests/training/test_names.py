"""The names of `peft_reslora.training`, and the paths under which 0.1.0 had them."""

from __future__ import annotations

import importlib

import pytest

from peft_reslora import training


def test_all_that_is_listed_is_there() -> None:
    assert all(hasattr(training, name) for name in training.__all__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("annealing", ["ShortcutAnnealing", "anneal_shortcuts", "annealed_share"]),
        (
            "restarts",
            [
                "MergeAndRestartCallback",
                "check_restartable",
                "load_base_weights",
                "merge_and_restart",
                "rewarm",
                "save_base_weights",
            ],
        ),
    ],
)
def test_the_paths_of_0_1_0_lead_to_the_same(module: str, names: list[str]) -> None:
    old = importlib.import_module(f"peft_reslora.recipes.{module}")
    for name in names:
        assert getattr(old, name) is getattr(training, name)
