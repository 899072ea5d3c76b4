"""ResLoRA on a base model in 4 bits, and its export as a LoRA, which loads without this package.

python examples/qlora.py --model Qwen/Qwen3-8B --data trl-lib/Capybara
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import load_dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from peft_reslora import ResLoRAConfig, save_as_lora


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--data", default="trl-lib/Capybara")
    parser.add_argument("--output", default="qlora")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=four_bits, dtype=torch.bfloat16)
    base = prepare_model_for_kbit_training(base)
    # The sum of 'block' is exact, so that the LoRA is what was trained, with at most twice its rank.
    model = get_peft_model(base, ResLoRAConfig(r=8, lora_alpha=16, target_modules="all-linear", shortcut="block"))

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=2e-4,
            max_length=1024,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset(options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
    )
    trainer.train()
    model.save_pretrained(options.output)
    save_as_lora(f"{options.output}/lora", model)


if __name__ == "__main__":
    main()
