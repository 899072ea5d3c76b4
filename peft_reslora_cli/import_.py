"""`peft-reslora import`: adapters of the papers' own repositories as native ones."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from peft_reslora_cli.arguments import Commands
from peft_reslora_cli.output import say


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "import",
        help="read an adapter of kongds/MoRA or LMOps' ResLoRA",
        description="Read an adapter that was trained with kongds/MoRA or with LMOps' ResLoRA, write it as a MoRA or "
        "ResLoRA adapter that PEFT loads, and print what was kept, converted and dropped. What has no equal here is "
        "refused, and nothing is written. Reads the base model's config, and not its weights.",
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="folder of the adapter, or of LMOps' whole model")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new or empty folder")
    parser.add_argument("--base", metavar="MODEL", help="base model (folder or Hub id); by default what the files say")
    return parser


def run(args: Namespace) -> int:
    """Import; a refusal ends the command."""
    from peft_reslora.imports import import_adapter

    say(import_adapter(args.source, args.out, base=args.base))
    say(f"Written: {args.out}")
    return 0
