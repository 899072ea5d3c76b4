"""What a method draws as it learns: a row of images at the start, and after each quarter of the steps."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback

from peft_reslora.experiments.images import as_array, as_tensor
from peft_reslora.shared.plots import require_matplotlib, save_figure

_PARTS = 4  # of a run, after each of which images are generated


class GridCallback(TrainerCallback):
    """Generates at the start and after each quarter of a run, and writes `<path>.png` with the real images on top.

    The rows are kept as pictures in the folder `path`, so that a run that goes on later has those of its start. No
    random number is drawn that training would draw.
    """

    def __init__(
        self, generate: Callable[[nn.Module], Tensor], real: Tensor, captions: Sequence[str], path: Path, title: str
    ) -> None:
        require_matplotlib()
        self._generate, self._real, self._captions = generate, real, captions
        self._path, self._title = path, title

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            shutil.rmtree(self._path, ignore_errors=True)  # of a run that was stopped before its first checkpoint
            self._take(0, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in {part * state.max_steps // _PARTS for part in range(1, _PARTS + 1)}:
            self._take(state.global_step, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        files = sorted(self._path.glob("step-*.png"))
        rows = {f"step {int(file.stem.removeprefix('step-'))}": _read_row(file) for file in files}
        draw_grid({"real": self._real, **rows}, self._captions, self._title, self._path.with_suffix(".png"))

    def _take(self, step: int, model: nn.Module) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        images = np.concatenate([as_array(image) for image in self._generate(model)], axis=1)
        Image.fromarray(images).save(self._path / f"step-{step:06d}.png")


def _read_row(file: Path) -> Tensor:
    """Square images side by side, as `_take` writes them."""
    with Image.open(file) as opened:
        row = as_tensor(opened.convert("RGB"))
    return torch.stack(row.split(row.shape[1], dim=2))


def draw_grid(rows: dict[str, Tensor], captions: Sequence[str], title: str, path: Path) -> None:
    """A row of images for each name, a column for each caption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 * len(captions), 1.4 * len(rows) + 0.6), layout="constrained")
    panels = figure.subplots(len(rows), len(captions), squeeze=False)
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(as_array(image), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    for axes, caption in zip(panels[0], captions, strict=True):
        axes.set_title(caption if len(caption) < 22 else f"{caption[:20]}…", fontsize=7)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)
