"""`peft-reslora export`: turn saved adapters into standard LoRA checkpoints."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_reslora_cli.arguments import DTYPES, Commands, positive, with_default
from peft_reslora_cli.output import say
from peft_reslora_cli.saved import layer_names

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "export",
        help="turn a saved adapter into a standard LoRA checkpoint",
        description="Turn a saved adapter into a standard LoRA checkpoint that loads where peft_reslora is not "
        "installed, and print what the conversion kept of each layer. Works from the files alone unless --base is "
        "given, which some adapters need; the message then says so.",
    )
    parser.add_argument(
        "adapters", type=Path, nargs="+", metavar="ADAPTER_DIR", help="folder with adapter_config.json, one or more"
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT_DIR",
        help="a new or empty folder, or an earlier export; for several adapters, the folder of their exports",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="load this base model (folder or Hub id) and read the export back"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=positive, metavar="N", help="keep at most N directions per layer; of nested ranks the first N"
    )
    size.add_argument("--energy", type=float, metavar="E", help="keep this share of each update's energy, in (0, 1]")
    parser.add_argument(
        "--allow-dora", action="store_true", help="write an adapter with use_dora as a DoRA, which loads in PEFT"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=with_default("type of the tensors"))
    parser.add_argument("--dry-run", action="store_true", help="print the report and write nothing")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the export as well, with the token of hf auth")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make the repository private")
    return parser


def run(args: Namespace) -> int:
    """Export each adapter; a refusal ends the command."""
    from tqdm import tqdm

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
    import torch

    from peft_reslora.export import export_lora, export_lora_from_files

    options = {"rank": args.rank, "energy": args.energy, "allow_dora": args.allow_dora}
    options["dtype"] = getattr(torch, args.dtype)
    base = None
    if args.base is None:
        exported = export_lora_from_files(adapter, **options)
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


def _load_adapter_on_base(folder: Path, base: str) -> PeftModel:
    """Load the base as the class that the adapter was trained on, and the adapter onto it; it then names this base."""
    from peft import PeftModel

    from peft_reslora.export.reading import read_config, read_tensors, refuse_patterns, refuse_uncovered

    config, layers = read_config(folder), layer_names(read_tensors(folder))
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
    import transformers

    from peft_reslora.export.base import base_classes, fitting_bases, is_oversized

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
