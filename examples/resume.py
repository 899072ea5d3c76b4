"""A run that is stopped half way and taken up again ends with the factors of one that was not.

    python examples/resume.py

A small model with random weights stands for yours; it takes a few seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_reslora import ResLoRAConfig

STEPS = 8


class StopAt(TrainerCallback):
    """Stands for a kill: no step after this one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def make_trainer(folder: Path, stop_at: int = STEPS) -> Trainer:
    set_seed(0)
    llama = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=100
    )
    config = ResLoRAConfig(r=4, target_modules="all-linear", shortcut="middle", pre_num=-1, lora_dropout=0.1)
    model = get_peft_model(LlamaForCausalLM(llama), config)
    ids = torch.randint(0, 100, (64, 16)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    training = TrainingArguments(str(folder), max_steps=STEPS, save_steps=4, report_to="none", disable_tqdm=True)
    return Trainer(model, training, train_dataset=rows, callbacks=[StopAt(stop_at)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="resume")
    folder = Path(parser.parse_args(arguments).output)

    unbroken = make_trainer(folder / "unbroken")
    unbroken.train()
    make_trainer(folder / "stopped", stop_at=4).train()
    resumed = make_trainer(folder / "stopped")
    resumed.train(resume_from_checkpoint=True)

    factors = dict(resumed.model.named_parameters())
    for name, parameter in unbroken.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(factors[name], parameter, msg=lambda text, name=name: f"{name}: {text}")
    print("The resumed run has the factors of the unbroken one.")


if __name__ == "__main__":
    main()
