"""MoRA in sentence-transformers: pairs of sentences that belong together.

python examples/sentence_embeddings.py --data sentence-transformers/all-nli --subset pair
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

from peft_reslora import MoRAConfig


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="sentence-transformers/all-nli", help="with columns `anchor`, `positive`")
    parser.add_argument("--subset", default=None, help="the data set's configuration, such as `pair`")
    parser.add_argument("--output", default="sentence-embeddings")
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args(arguments)

    rows = load_dataset(options.data, options.subset, split="train")
    model = SentenceTransformer(options.model)
    model.add_adapter(MoRAConfig(task_type="FEATURE_EXTRACTION", r=8, target_modules=["query", "key", "value"]))
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            options.output, max_steps=options.steps, learning_rate=1e-3, report_to="none"
        ),
        train_dataset=rows.select_columns(["anchor", "positive"]),
        loss=MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
