"""Images of a data set: found, decoded, checked, and cut to squares, with their captions."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from peft_reslora.experiments.data import Data, Row, Split, load_data
from peft_reslora.experiments.settings import DataSettings, ImageSettings


def image_settings(settings: DataSettings) -> ImageSettings:
    """The section with the images.

    Raises:
        ValueError: if there is none.
    """
    if settings.images is None:
        raise ValueError("data.images is missing; text_to_image needs it.")
    return settings.images


def load_image_data(settings: DataSettings) -> Data:
    """The rows of the family that is adapted to (without one, all), each with an image that was decoded once.

    Raises:
        ValueError: as `load_data`; for an image that cannot be decoded, with file, row and column; for a family that
            does not exist.
    """
    images = image_settings(settings)
    _check_family(settings)
    keep = None if images.family is None else lambda row: row[images.family_column] == images.family
    data = load_data(settings, _columns(settings), keep)
    checksums = {f"images of {name}": _checksum(split, settings) for name, split in data.splits.items()}
    return Data(data.splits, {**data.checksums, **checksums})


def other_families(settings: DataSettings) -> Split:
    """The training rows of all families but the one that is adapted to, without any held back."""
    images = image_settings(settings)
    whole = dataclasses.replace(settings, train_rows=None, validation_rows=None, test_rows=None)
    data = load_data(whole, _columns(settings), lambda row: row[images.family_column] != images.family)
    return data.splits["train"]


def _columns(settings: DataSettings) -> list[str]:
    images = image_settings(settings)
    return [*settings.text, images.column, *([] if images.family is None else [images.family_column])]


def _check_family(settings: DataSettings) -> None:
    images = image_settings(settings)
    if images.family is None:
        return
    whole = dataclasses.replace(settings, train_rows=None, validation_rows=None, test_rows=None)
    train = load_data(whole, _columns(settings)).splits["train"]
    families = sorted({str(row[images.family_column]) for row in train.rows})
    if images.family not in families or len(families) < 2:
        raise ValueError(
            f"{train.source}, column {images.family_column!r}: data.images.family={images.family!r} must be one of "
            f"several families; there are {', '.join(families[:20])}."
        )


def caption_of(settings: DataSettings, row: Row) -> str:
    return ", ".join(str(row[column]).strip() for column in settings.text)


def pixels(split: Split, settings: DataSettings) -> Iterator[Tensor]:
    """The images in the order of the rows, from -1 to 1: shape `(3, size, size)` each.

    Raises:
        ValueError: naming file, row and column of an image that cannot be decoded.
    """
    images = image_settings(settings)
    for index, row in enumerate(split.rows):
        try:
            image = _decoded(row[images.column], split, settings)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
            raise ValueError(f"{split.place(index, images.column)}: no image ({error}).") from error
        yield as_tensor(_square(image, images.size))


def all_pixels(split: Split, settings: DataSettings) -> Tensor:
    """Shape `(rows, 3, size, size)`."""
    return torch.stack(list(pixels(split, settings)))


def _decoded(value: Any, split: Split, settings: DataSettings) -> Image.Image:
    images = image_settings(settings)
    if images.sheet is not None:
        sheet = _sheet(Path(settings.folder or ".").expanduser() / images.sheet)
        return _tile(sheet, int(value), images.size)
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, dict):  # of datasets: the file's bytes, or its path
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else Path(value["path"])
    file = value if isinstance(value, io.BytesIO) else Path(split.source).parent / str(value)
    with Image.open(file) as opened:
        return opened.convert("RGB")


@lru_cache(maxsize=1)
def _sheet(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _tile(sheet: Image.Image, number: int, size: int) -> Image.Image:
    columns, rows = sheet.width // size, sheet.height // size
    if not 0 <= number < columns * rows:
        raise ValueError(f"tile {number} of a sheet with {columns * rows} tiles of {size} pixels")
    left, top = size * (number % columns), size * (number // columns)
    return sheet.crop((left, top, left + size, top + size))


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.crop((left, top, left + side, top + side))
    return cut if side == size else cut.resize((size, size), Image.Resampling.LANCZOS)


def as_tensor(image: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(image, dtype=np.float32))
    return array.permute(2, 0, 1) / 127.5 - 1


def as_array(image: Tensor) -> Any:
    """Bytes of shape `(height, width, 3)`, of an image from -1 to 1."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def _checksum(split: Split, settings: DataSettings) -> str:
    digest = hashlib.sha256()
    for image in pixels(split, settings):
        digest.update(as_array(image).tobytes())
    return digest.hexdigest()
