"""The commands of `peft-reslora`: each gets parsed arguments, calls the library, prints, and returns the exit code.

The arguments are described in `peft_reslora_cli`, which can be imported without torch.
"""

from __future__ import annotations

import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor
from tqdm import tqdm

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import LoraExport, export_lora, export_lora_from_files
from peft_reslora.export.base import base_classes, fitting_bases, is_oversized, without_weights
from peft_reslora.export.reading import read_config, read_tensors, refuse_patterns, refuse_uncovered
from peft_reslora.reslora.chain_table import ChainTable
from peft_reslora.reslora.linking import find_chains_before_injection
from peft_reslora.reslora.merging.estimators import (
    SHORTCUT_PARTS,
    UNRECORDED,
    Block,
    blocks_from_state_dict,
    chains_of_blocks,
    is_exact,
)
from peft_reslora.shared.card import method_name
from peft_reslora.shared.names import bare_name
from peft_reslora.shared.stamps import STAMP_NAMES
from peft_reslora.shared.tables import format_table
from peft_reslora.shared.text import printable


def say(text: object) -> None:
    """Print; of what a name may hold, only what does nothing to the terminal."""
    print("\n".join(map(printable, str(text).split("\n"))), flush=True)  # noqa: T201


def quickstart(args: Namespace) -> int:
    """Train LoRA and ResLoRA on real text, export, and check the export."""
    try:
        from peft_reslora.recipes.quickstart import run_quickstart
    except ModuleNotFoundError as error:
        raise ValueError(f"the quickstart needs {error.name}; run: pip install 'peft_reslora[demo]'") from error
    return 0 if run_quickstart(args.out, args.shortcut, args.steps, args.seed, say) else 1


def export(args: Namespace) -> int:
    """Turn saved adapters into standard LoRA checkpoints; a refusal ends the command."""
    several = len(args.adapters) > 1
    folders = {adapter: args.out / adapter.resolve().name if several else args.out for adapter in args.adapters}
    if len(set(folders.values())) < len(folders):
        raise ValueError("two of the adapter folders have the same name; export them one by one")
    if several and args.push_to_hub:
        raise ValueError("--push-to-hub takes one adapter; push them one by one")
    # The command goes into the model card, which need not tell where on this machine things lie.
    words = [Path(word).name if Path(word).is_absolute() else word for word in args.argv]
    command = shlex.join(["peft-reslora", *words])
    for adapter, folder in tqdm(folders.items(), desc="Exporting", disable=not several or not sys.stderr.isatty()):
        _export_one(adapter, folder, args, command)
    return 0


def _export_one(adapter: Path, folder: Path, args: Namespace, command: str) -> None:
    options = {"rank": args.rank, "energy": args.energy, "dtype": getattr(torch, args.dtype)}
    base = None
    if args.base is None:
        exported: LoraExport = export_lora_from_files(adapter, **options)
    else:
        model = _load_adapter_on_base(adapter, args.base)
        exported = export_lora(model, progressbar=sys.stderr.isatty(), **options)
        base = model.unload()
    say(exported.report)
    if args.dry_run:
        say(f"Dry run: nothing was written to {folder}.")
        return
    exported.save_pretrained(folder, base, command=command)
    say(f"Written: {folder}" + (", and read back by plain PEFT with the same result." if base is not None else ""))
    if args.push_to_hub:
        say(f"Pushed: {exported.push_to_hub(args.push_to_hub, private=args.private or None, command=command)}")


def inspect(args: Namespace) -> int:
    """Show the chains of a saved adapter, or those a model would get."""
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
    refuse_patterns(config, _layer_names(tensors))
    say(_describe_adapter(config, tensors))
    return 0


def _chains_of_model(name: str, chosen: dict[str, Any]) -> ChainTable:
    """The chains a model would get; it is built from its config on the meta device, so without memory or weights."""
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
    if is_exact(blocks, config):
        return "merge: exact"
    calibrated = sum(block.shortcut is not None for block in blocks)
    recorded = sum(block.norms is not None and bool((block.norms != UNRECORDED).any()) for block in blocks)
    data = f"norms recorded for {recorded}, calibrated {calibrated} of {len(blocks)} layers"
    return f"merge: estimated by merge_estimator={config.merge_estimator!r}; {data}"


def _load_adapter_on_base(folder: Path, base: str) -> PeftModel:
    """Load the base as the class that the adapter was trained on, and the adapter onto it; it then names this base."""
    config, layers = read_config(folder), _layer_names(read_tensors(folder))
    base_model = _class_of_base(folder, config, base, layers).from_pretrained(base)
    refuse_patterns(config, [*layers, *(name for name, _ in base_model.named_modules())])
    if hasattr(config, "target_modules"):
        refuse_uncovered(config, layers, folder.name)
    try:
        model = PeftModel.from_pretrained(base_model, str(folder))
    except RuntimeError as error:  # torch's word for tensors of other shapes
        raise ValueError(f"the adapter in {folder} does not fit the base model {base}: {error}") from error
    model.peft_config["default"].base_model_name_or_path = base
    return model


def _class_of_base(folder: Path, config: PeftConfig, base: str, layers: set[str]) -> Any:
    """The class of transformers whose models have the adapter's layers; the likeliest one where none has."""
    if is_oversized(base_config := transformers.AutoConfig.from_pretrained(base)):
        raise ValueError(f"the config of {base} asks for more layers than any model has")
    fitting = (base_class for base_class, _ in fitting_bases(config, base_config, layers))
    found = next(fitting, None)
    name = (config.auto_mapping or {}).get("base_model_class") if config.task_type is None else None
    if found is None and name is not None and not hasattr(transformers, name):
        raise ValueError(
            f"{folder} was trained on a {name}, which is not a class of transformers; call "
            "peft_reslora.save_as_lora(path, model) on the loaded model instead"
        )
    if found is None and not (likely := base_classes(config, base_config)):
        raise ValueError(f"transformers has no class for a model such as {base}, whose model_type is another")
    return found or likely[0]


def _layer_names(tensors: dict[str, Tensor]) -> set[str]:
    """The layers of a saved adapter, by whichever method."""
    found = (re.match(r"(?:base_model\.model\.)?(.+?)\.(?:lora|mora|hada|lokr)_", key) for key in tensors)
    return {bare_name(match[1]) for match in found if match}
