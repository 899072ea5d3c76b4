"""Annealing: an `input` or `middle` shortcut fades out in the last part of training, and the merge then loses nothing.

    python examples/annealing.py
    python examples/annealing.py --shortcut input

A small model with random weights stands for yours; it takes some seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from peft_reslora import ResLoRAConfig, merge_report
from peft_reslora.training import ShortcutAnnealing


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shortcut", default="middle", choices=["input", "middle"])
    parser.add_argument("--output", default="annealing")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)

    llama = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=100
    )
    for callbacks in ([], [ShortcutAnnealing(start=2 / 3, end=0.9)]):
        set_seed(0)
        ids = torch.randint(0, 100, (64, 16))
        config = ResLoRAConfig(r=4, target_modules="all-linear", shortcut=options.shortcut)
        model = get_peft_model(LlamaForCausalLM(llama), config)
        rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
        training = TrainingArguments(
            options.output, max_steps=options.steps, learning_rate=1e-2, report_to="none", disable_tqdm=True
        )
        Trainer(model, training, train_dataset=rows, callbacks=callbacks).train()
        print("annealed" if callbacks else "not annealed")
        print(merge_report(model, [{"input_ids": ids[:8]}]))


if __name__ == "__main__":
    main()
