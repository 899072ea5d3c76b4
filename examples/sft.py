"""ResLoRA in TRL's SFTTrainer: conversations, the loss on the answers.

python examples/sft.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara
accelerate launch --config_file configs/accelerate/fsdp2.yaml --fsdp_transformer_layer_cls_to_wrap Qwen3DecoderLayer \
        examples/sft.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from peft_reslora import ResLoRAConfig


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", default="trl-lib/Capybara", help="of messages, or prompt and completion")
    parser.add_argument("--shortcut", default="block", choices=["input", "block", "middle"])
    parser.add_argument("--output", default="sft")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)

    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=2e-4,
            max_length=1024,
            gradient_checkpointing=True,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset(options.data, split="train"),
        peft_config=ResLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear", shortcut=options.shortcut),
    )
    trainer.train()
    trainer.save_model(options.output)  # also where each process holds a part: then export from these files


if __name__ == "__main__":
    main()
