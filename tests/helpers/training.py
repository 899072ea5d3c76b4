"""What a run of transformers' Trainer has logged."""

from __future__ import annotations

from transformers import Trainer


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
