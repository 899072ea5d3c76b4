"""The commands of `peft-reslora`: each gets parsed arguments, calls the library, prints, and returns the exit code.

The arguments are described in `peft_reslora_cli`, which can be imported without torch.
"""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import LoraExport, export_lora, export_lora_from_files
from peft_reslora.export.card import method_name
from peft_reslora.mora.model import size_table
from peft_reslora.reslora.chain import ChainTable, format_table
from peft_reslora.reslora.linking import find_chains_before_injection
from peft_reslora.reslora.merge import (
    SHORTCUT_PARTS,
    UNRECORDED,
    Block,
    blocks_from_state_dict,
    chains_of_blocks,
    is_exact,
)
from peft_reslora.saving import WEIGHTS_FILE, refuse_damaged
from peft_reslora.stamps import STAMP_NAMES

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}

say = partial(print, flush=True)


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
    say(_describe_adapter(_read_config(folder), _read_tensors(folder)))
    return 0


def _chains_of_model(name: str, chosen: dict[str, Any]) -> ChainTable:
    """The chains a model would get; it is built from its config on the meta device, so without memory or weights."""
    if chosen.get("target_modules") == ["all-linear"]:
        chosen["target_modules"] = "all-linear"
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is no saved adapter, and loading it as a model gives: {error}") from error
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    table = find_chains_before_injection(model, ResLoRAConfig(**chosen))
    if not table.chains:
        linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise ValueError(f"nothing in {name} is targeted; choose --target-modules from {', '.join(linear)}")
    return table


def _describe_adapter(config: PeftConfig, tensors: dict[str, Tensor]) -> str:
    buffers = ("lora_norm", *SHORTCUT_PARTS, *(STAMP_NAMES if config.peft_type in ("RESLORA", "MORA") else ()))
    parameters = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith(buffers))
    lines = [f"{method_name(config)} adapter for {config.base_model_name_or_path}, {parameters:,} parameters"]
    if isinstance(config, ResLoRAConfig):
        blocks = blocks_from_state_dict(config, tensors)
        lines += [_describe_merge(config, list(blocks.values())), str(chains_of_blocks(config, blocks))]
    elif isinstance(config, MoRAConfig):
        lines += format_table(size_table(config, {key: len(tensor) for key, tensor in tensors.items()}))
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


def _read_config(folder: Path) -> PeftConfig:
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json, so it is not the folder of a saved adapter")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'adapter_config.json'} cannot be read as an adapter's config: {error!r}"
        ) from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; save the adapter again")
    refuse_damaged(path)
    return load_file(path)


def _load_adapter_on_base(folder: Path, base: str) -> PeftModel:
    """Load the base as the class that the adapter was trained on, and the adapter onto it; it then names this base."""
    config = _read_config(folder)
    if config.task_type is not None:
        name = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), "AutoModel")
    else:
        name = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(
            f"{folder} was trained on a {name}, which is not a class of transformers; call "
            "peft_reslora.save_as_lora(path, model) on the loaded model instead"
        )
    base_model = model_class.from_pretrained(base)
    try:
        model = PeftModel.from_pretrained(base_model, str(folder))
    except RuntimeError as error:  # torch's word for tensors of other shapes
        raise ValueError(f"the adapter in {folder} does not fit the base model {base}: {error}") from error
    model.peft_config["default"].base_model_name_or_path = base
    return model
