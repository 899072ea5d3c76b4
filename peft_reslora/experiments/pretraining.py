"""A small language model trained from scratch on text, as the base of experiments; kept by its content."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from peft_reslora.experiments.arithmetic import infix, plain_numbers, unmask
from peft_reslora.experiments.data import Row, read_file
from peft_reslora.experiments.hub_rows import load_hub_split
from peft_reslora.experiments.provenance import fingerprint
from peft_reslora.experiments.settings import BaseSettings, PretrainSettings, TextSource
from peft_reslora.experiments.tokenizers import train_bpe
from peft_reslora.shared.files import replaced_folder

_HELD_OUT = 64  # rows of the first source, for what the base forgets
_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    """`PEFT_RESLORA_CACHE`, else a folder in the user's cache."""
    return Path(os.environ.get("PEFT_RESLORA_CACHE", Path.home() / ".cache" / "peft_reslora")) / "bases"


def read_texts(settings: PretrainSettings) -> tuple[list[str], list[str]]:
    """Texts to train on, and held-out ones of the first source."""
    texts: list[str] = []
    held_out: list[str] = []
    for source in settings.sources:
        rows = [source_text(source, row) for row in _source_rows(settings, source)]
        if not held_out:
            held_out, rows = rows[-_HELD_OUT:], rows[:-_HELD_OUT]
        texts += rows
    if not texts or not held_out:
        raise ValueError(f"base.pretrain.sources have too few rows; the first needs more than {_HELD_OUT}.")
    return texts, held_out


def _source_rows(settings: PretrainSettings, source: TextSource) -> list[Row]:
    if settings.folder is not None or source.hub is None:
        if source.file is None:
            raise ValueError("a source of base.pretrain has neither hub nor file.")
        return read_file(Path(settings.folder or ".").expanduser() / source.file)
    way_out = "With a copy of its files: base.pretrain.folder=DIR, and `file` of each source."
    return list(load_hub_split(source.hub, source.hub.train, way_out))


def source_text(source: TextSource, row: Row) -> str:
    """The template filled with the row; MAWPS' masked numbers put in, and its equation in infix notation."""
    if source.masked_numbers:
        values = str(row["Numbers"]).split()
        row = {name: unmask(str(value), values) for name, value in row.items()}
        row["Equation"] = infix(row["Equation"])
    try:
        return plain_numbers(source.text.format(**row))
    except KeyError as error:
        raise ValueError(f"{source.file or source.hub}: no column {error}; there are {', '.join(row)}.") from error


def pretrained(
    settings: BaseSettings, pretrain: PretrainSettings
) -> tuple[nn.Module, PreTrainedTokenizerBase, list[str]]:
    """The base and its tokenizer, from the cache if the same was trained before; and held-out texts."""
    texts, held_out = read_texts(pretrain)
    what = {k: v for k, v in asdict(pretrain).items() if k not in ("folder", "sources")}
    key = fingerprint([texts, what, settings.config, settings.fields, settings.vocabulary])
    folder = cache_folder() / key
    if not (folder / "model.safetensors").is_file():
        tokenizer = train_bpe(texts, settings.vocabulary)
        model = _train(settings, pretrain, tokenizer, texts)
        with replaced_folder(folder, _FILES) as new:
            model.save_pretrained(str(new))
            tokenizer.save_pretrained(str(new))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), held_out


def _train(
    settings: BaseSettings, pretrain: PretrainSettings, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Any:
    """AdamW with warmup and a linear decay over blocks of text in random order."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(settings, tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=pretrain.rate, weight_decay=0.01)
    batches = _batches(blocks(tokenizer, texts, pretrain.length), pretrain.batch)
    for step in tqdm(range(pretrain.steps), desc="pretraining", unit="step"):
        share = min((step + 1) / max(1, pretrain.steps // 20), (pretrain.steps - step) / pretrain.steps)
        for group in optimizer.param_groups:
            group["lr"] = pretrain.rate * share
        batch = next(batches)
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _config(settings: BaseSettings, tokenizer: PreTrainedTokenizerBase) -> Any:
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return AutoConfig.for_model(str(settings.config), vocab_size=len(tokenizer), **ids, **settings.fields)


def blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> Tensor:
    """All texts, each between `<s>` and `</s>`, end to end in blocks of this length: shape `(blocks, length)`."""
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    if len(stream) < length:
        raise ValueError(f"the text has {len(stream)} tokens, fewer than base.pretrain.length={length}.")
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def _batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(size):
            yield rows[chosen]
