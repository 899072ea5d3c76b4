"""MoRA (arXiv 2405.12130): one square matrix per layer, a high-rank update at LoRA's parameter count."""

from .config import AUTO_SHARING_FROM_RANK, MoRAConfig
from .layer import MoRALayer, MoRALinear
from .model import LayerSize, MoRAModel, layer_sizes

__all__ = [
    "AUTO_SHARING_FROM_RANK",
    "LayerSize",
    "MoRAConfig",
    "MoRALayer",
    "MoRALinear",
    "MoRAModel",
    "layer_sizes",
]
