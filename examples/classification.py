"""ResLoRA in transformers' Trainer: a text's class.

python examples/classification.py --model answerdotai/ModernBERT-base --data stanfordnlp/imdb
python examples/classification.py --data reviews.jsonl --shortcut middle      # lines of {"text": ..., "label": 0}
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import load_dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peft_reslora import ResLoRAConfig, describe_chains


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="answerdotai/ModernBERT-base")
    parser.add_argument("--data", default="stanfordnlp/imdb")
    parser.add_argument("--shortcut", default="block", choices=["input", "block", "middle"])
    parser.add_argument("--output", default="classification")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = load_dataset(options.data, split="train")
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=["text"])
    classes = max(rows["label"]) + 1
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=classes)
    config = ResLoRAConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear", shortcut=options.shortcut)
    model = get_peft_model(base, config)
    print(describe_chains(model))

    training = TrainingArguments(options.output, max_steps=options.steps, learning_rate=5e-4, report_to="none")
    trainer = Trainer(model, training, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    model.save_pretrained(options.output)
    model.merge_and_unload().save_pretrained(f"{options.output}/merged")  # a plain model, for any program


if __name__ == "__main__":
    main()
