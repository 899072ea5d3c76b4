"""`peft-reslora compare`: many tuners on one task."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from peft_reslora_cli.arguments import Commands
from peft_reslora_cli.config_files import find_config
from peft_reslora_cli.output import say

_WIDTH = 120  # of the table in a file or a pipe, in characters


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "compare",
        help="compare tuners on one task: learning rates, seeds, costs, with a report",
        description="Train every method of a YAML file at a grid of learning rates, then with several seeds at its "
        "best one, and write REPORT.md, a table and figures. Finished runs are lines in the output folder, so that "
        "the same command goes on where it was stopped.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that comes with the package")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace a value, as training.max_steps=10")
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="run this part of the methods only"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the report of what has run")
    return parser


def run(args: Namespace) -> int:
    """Run what is missing and show the table."""
    from rich.console import Console

    from peft_reslora.experiments.compare_settings import compare_settings
    from peft_reslora.experiments.comparison import prepare
    from peft_reslora.experiments.config_file import read_config
    from peft_reslora.experiments.report import terminal_table

    settings = compare_settings(read_config(find_config(args.config), args.overrides))
    comparison = prepare(settings, args.shard, say)
    summaries = comparison.report() if args.report else comparison.run(args.shard)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(terminal_table(summaries, settings.title))
    say(f"everything is in {settings.output_dir}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal() or not 1 <= int(part) <= int(parts):
        raise ArgumentTypeError(f"{text!r} is no part such as 1/4")
    return int(part), int(parts)
