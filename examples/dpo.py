"""ResLoRA in TRL's DPOTrainer: of two answers, the better one. With the adapter off, the model is its own reference.

python examples/dpo.py --model Qwen/Qwen3-0.6B --data trl-lib/ultrafeedback_binarized
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

from peft_reslora import ResLoRAConfig


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="of prompt, chosen, rejected")
    parser.add_argument("--output", default="dpo")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)

    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=5e-5,
            max_length=1024,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset(options.data, split="train"),
        peft_config=ResLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
