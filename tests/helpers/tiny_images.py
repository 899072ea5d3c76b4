"""Settings of image runs that take seconds: a tiny UNet, and tiles of one color each with its name."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

from PIL import Image

SIDE, COLUMNS = 8, 8
FAMILIES = {"warm": ["red", "orange", "yellow"], "cold": ["blue", "green", "violet"]}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_COLORS = {
    "red": (220, 20, 20),
    "orange": (240, 140, 20),
    "yellow": (240, 230, 40),
    "blue": (20, 40, 220),
    "green": (20, 180, 40),
    "violet": (140, 40, 200),
}


def color_of(caption: str) -> tuple[int, int, int]:
    return _COLORS[caption.split()[0]]


def write_tiles(folder: Path, rows: int = 32) -> Path:
    """`sheet.png` and `captions.csv`; the families take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * -(-rows // COLUMNS)))
    with (folder / "captions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "caption", "category"])
        for index in range(rows):
            family = list(FAMILIES)[index % 2]
            caption = f"{draw.choice(FAMILIES[family])} {draw.choice(['square', 'tile'])} {index}"
            sheet.paste(color_of(caption), (SIDE * (index % COLUMNS), SIDE * (index // COLUMNS), *_end(index)))
            writer.writerow([index, caption, family])
    sheet.save(folder / "sheet.png")
    return folder


def _end(index: int) -> tuple[int, int]:
    return SIDE * (index % COLUMNS + 1), SIDE * (index // COLUMNS + 1)


def tiny_image_run(folder: Path, output: Path) -> dict[str, Any]:
    """A training run's settings, as a YAML file would hold them."""
    return {
        "task": "text_to_image",
        "base": {
            "config": "unet",
            "block_out_channels": [8, 16],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 1,
            "transformer_layers_per_block": 2,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            "text_encoder": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "vocabulary": 300,
            "pretrain": {"steps": 2, "batch": 4},
        },
        "data": {
            "folder": str(folder),
            "files": {"train": "captions.csv"},
            "text": ["caption"],
            "images": {
                "sheet": "sheet.png",
                "column": "index",
                "size": SIDE,
                "family": "warm",
                "draws": 4,
                "timesteps": 3,
                "samples": 2,
                "shown": 2,
                "sampling_steps": 2,
            },
            "validation_rows": 3,
            "test_rows": 4,
            "max_length": 12,
        },
        "tuner": {"peft_type": "RESLORA", "r": 2, "lora_alpha": 4, "target_modules": TARGETS, "shortcut": "input"},
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "output_dir": str(output),
    }


def tiny_image_comparison(folder: Path, output: Path) -> dict[str, Any]:
    """A comparison's settings: two methods, two rates, three seeds."""
    run = tiny_image_run(folder, output)
    del run["training"]["learning_rate"]
    run["training"]["max_steps"] = 2
    tuner = {"r": 2, "lora_alpha": 4}
    return {
        **run,
        "title": "Tiles",
        "tuner": {"target_modules": TARGETS},
        "methods": {
            "LoRA": {"tuner": {"peft_type": "LORA", **tuner}},
            "ResLoRA middle": {"tuner": {"peft_type": "RESLORA", **tuner, "shortcut": "middle"}},
        },
        "reference": "LoRA",
        "rates": {"lowest": 1e-3, "highest": 3.2e-3},
        "seeds": [0, 1, 2],
        "cost_pairs": 1,
    }
