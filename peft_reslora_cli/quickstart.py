"""`peft-reslora quickstart`: train LoRA and ResLoRA on real text, export, and check the export."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from peft_reslora_cli.arguments import SHORTCUTS, Commands, positive, with_default
from peft_reslora_cli.output import say


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "quickstart",
        help="train LoRA and ResLoRA on real text, export, and check the export; about 2 minutes on a CPU",
        description="Train LoRA and ResLoRA side by side on the docstrings of Python's standard library, draw both "
        "loss curves, merge, export a standard LoRA, and check it in a process without peft_reslora. Needs no network "
        "and no data file; about 2 minutes on two CPU cores.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reslora-quickstart"), metavar="DIR", help=with_default("write to")
    )
    parser.add_argument("--shortcut", choices=SHORTCUTS, default="block", help=with_default("ResLoRA's shortcut"))
    parser.add_argument(
        "--steps", type=positive, default=120, metavar="N", help=with_default("training steps per method")
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=with_default("random seed"))
    return parser


def run(args: Namespace) -> int:
    """Run the quickstart: 0, or 1 where its check of the export fails."""
    from peft_reslora.recipes.quickstart import run_quickstart

    return 0 if run_quickstart(args.out, args.shortcut, args.steps, args.seed, say) else 1
