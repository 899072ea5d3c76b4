"""`peft-reslora inspect`: show the chains of a saved adapter, or those a model would get."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_reslora_cli.arguments import SHORTCUTS, Commands
from peft_reslora_cli.output import say
from peft_reslora_cli.saved import layer_names

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

    from peft_reslora import ResLoRAConfig
    from peft_reslora.reslora.chain_table import ChainTable
    from peft_reslora.reslora.merging.estimators import Block


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "inspect",
        help="show the chains of a saved ResLoRA adapter, or those a model would get",
        description="Show which layers feed which. For a saved adapter also its ranks, size and what its merge needs; "
        "for a model (folder or Hub id) the chains that ResLoRA would make, from its config, without its weights.",
    )
    parser.add_argument("target", metavar="ADAPTER_DIR|MODEL", help="saved adapter, model folder or Hub id")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="for a model: layers to adapt, or all-linear"
    )
    parser.add_argument("--shortcut", choices=SHORTCUTS, help="for a model (default: block)")
    parser.add_argument(
        "--pre-num", type=int, metavar="N", help="for a model: earlier layers that take part, -1 for all"
    )
    return parser


def run(args: Namespace) -> int:
    """Print what is known of an adapter or a model."""
    from peft_reslora.export.reading import read_config, read_tensors, refuse_patterns

    chosen: dict[str, Any] = {
        "target_modules": args.target_modules,
        "shortcut": args.shortcut,
        "pre_num": args.pre_num,
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    folder = Path(args.target)
    if not (folder / "adapter_config.json").is_file():
        say(_chains_of_model(args.target, chosen))
        return 0
    if chosen:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise ValueError(f"{folder} is a saved adapter, which has its own settings; leave out {flags}")
    config, tensors = read_config(folder), read_tensors(folder)
    refuse_patterns(config, layer_names(tensors))
    say(_describe_adapter(config, tensors))
    return 0


def _chains_of_model(name: str, chosen: dict[str, Any]) -> ChainTable:
    """The chains a model would get; it is built from its config on the meta device, so without memory or weights."""
    import torch
    import transformers
    from peft import PeftConfig

    from peft_reslora import ResLoRAConfig
    from peft_reslora.export.base import base_classes, without_weights
    from peft_reslora.reslora.linking import find_chains_before_injection

    if chosen.get("target_modules") == ["all-linear"]:
        chosen["target_modules"] = "all-linear"
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no saved adapter, and loading it as a model gives: {error}") from error
    classes = base_classes(PeftConfig(), config)  # AutoModel's comes last, and gives the shortest names
    models = (without_weights(base_class, config) for base_class in reversed(classes))
    if (model := next((model for model in models if model is not None), None)) is None:
        raise ValueError(f"transformers has no class that makes a model of the config of {name}")
    table = find_chains_before_injection(model, ResLoRAConfig(**chosen))
    if not table.chains:
        linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ValueError(f"nothing in {name} is targeted; choose --target-modules from {', '.join(linear)}")
    return table


def _describe_adapter(config: PeftConfig, tensors: dict[str, Tensor]) -> str:
    from peft_reslora import MoRAConfig, ResLoRAConfig
    from peft_reslora.reslora.merging.estimators import SHORTCUT_PARTS, blocks_from_state_dict, chains_of_blocks
    from peft_reslora.shared.card import method_name
    from peft_reslora.shared.stamps import STAMP_NAMES
    from peft_reslora.shared.tables import format_table
    from peft_reslora.shared.text import printable

    buffers = ("lora_norm", *SHORTCUT_PARTS, *(STAMP_NAMES if config.peft_type in ("RESLORA", "MORA") else ()))
    parameters = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(buffers))
    lines = [
        f"{method_name(config)} adapter for {printable(config.base_model_name_or_path)}, {parameters:,} parameters"
    ]
    if isinstance(config, ResLoRAConfig):
        blocks = blocks_from_state_dict(config, tensors)
        lines += [_describe_merge(config, list(blocks.values())), str(chains_of_blocks(config, blocks))]
    elif isinstance(config, MoRAConfig):
        lines += format_table(
            config.size_table({key: tensor.shape[0] for key, tensor in tensors.items() if tensor.ndim})
        )
    else:
        lines.append("Only ResLoRA links layers, so there are no chains.")
    return "\n".join(lines)


def _describe_merge(config: ResLoRAConfig, blocks: list[Block]) -> str:
    from peft_reslora.reslora.merging.estimators import UNRECORDED, is_exact

    if is_exact(blocks, config):
        return "merge: exact"
    calibrated = sum(block.shortcut is not None for block in blocks)
    recorded = sum(block.norms is not None and bool((block.norms != UNRECORDED).any()) for block in blocks)
    data = f"norms recorded for {recorded}, calibrated {calibrated} of {len(blocks)} layers"
    return f"merge: estimated by merge_estimator={config.merge_estimator!r}; {data}"
