"""Use the LoRA that the quickstart exported: plain torch, transformers and PEFT, no plugin.

    python use_lora.py [LOGITS_FILE]

It stands in the folder that the quickstart wrote, prints the accuracy on the test texts, and saves their logits where
a file is named. This is the whole code that using an exported adapter takes.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def main(folder: Path, logits_file: str | None = None) -> None:
    """Load base and adapter from `folder` and predict the test texts that lie there."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, str(folder / "lora")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    test = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    logits = []
    for start in range(0, len(test["texts"]), 64):
        texts = test["texts"][start : start + 64]
        batch = tokenizer(texts, truncation=True, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**batch).logits)
    predicted = torch.cat(logits).argmax(dim=-1)

    correct = (predicted == torch.tensor(test["targets"])).float().mean().item()
    sys.stdout.write(f"test accuracy {100 * correct:.1f} %\n")
    if logits_file:
        save_file({"logits": torch.cat(logits)}, logits_file)
    if "peft_reslora" in sys.modules:
        sys.exit("peft_reslora was imported, so this is not a test of plain PEFT.")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent, *sys.argv[1:2])
