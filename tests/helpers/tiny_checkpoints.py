"""Folders with tiny models and rows of text, as the scripts in `examples` read them: from_pretrained, load_dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_reslora.experiments.tokenizers import train_bpe

TEXTS = ["a good film", "a dull plot", "the cast is fine", "what an awful story", "so lovely and great"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    """A data set in a folder, one split."""
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def write_chats(folder: Path, count: int) -> str:
    """A data set of conversations in a folder, one split."""
    turns = [(TEXTS[index % 5], TEXTS[(index + 1) % 5]) for index in range(count)]
    pairs = [[{"role": "user", "content": ask}, {"role": "assistant", "content": say}] for ask, say in turns]
    return write_rows(folder, [{"messages": pair} for pair in pairs])


def write_images(folder: Path, count: int = 4) -> str:
    """An image folder of diffusers' and datasets' form, with captions in `text`."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (20, 24), (60 * index, 100, 0)).save(folder / f"{index}.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": TEXTS[index]}) for index in range(count)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def write_llama(folder: Path) -> str:
    """A Llama with its tokenizer and a chat template."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_bert(folder: Path, classifier: bool) -> str:
    """A BERT with its tokenizer."""
    torch.manual_seed(0)
    kind = BertForSequenceClassification if classifier else BertModel
    kind(BertConfig(vocab_size=300, max_position_embeddings=64, **SIZES)).save_pretrained(folder)
    train_bpe(TEXTS, 300).save_pretrained(folder)
    return str(folder)


def write_pipeline(folder: Path) -> str:
    """A Stable Diffusion pipeline for images of 16 x 16."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=300, max_position_embeddings=16, **SIZES)),
        tokenizer=_fixed_length(16),
        unet=UNet2DConditionModel(
            block_out_channels=(32, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def _fixed_length(length: int) -> Any:
    """CLIP's own class of tokenizer, which the pipeline asks for, with a vocabulary of characters."""
    from transformers import CLIPTokenizer

    characters = [chr(code) for code in range(97, 123)]
    tokens = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        model_max_length=length,
        pad_token="<|endoftext|>",
    )
