"""`peft-reslora train`: one run from a YAML file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from peft_reslora_cli.arguments import Commands
from peft_reslora_cli.config_files import find_config
from peft_reslora_cli.output import say


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "train",
        help="train an adapter from a YAML config, with metrics, export and card in one folder",
        description="Train one adapter: base, data, tuner and training arguments stand in a YAML file. A run that was "
        "killed goes on where it stopped when the same command is given again. `peft-reslora configs` lists the files "
        "that come with the package.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of one that comes with the package")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="replace a value, as training.max_steps=10")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be trained; nothing is trained and no weights are loaded (the Hub may be asked for the "
        "base's config)",
    )
    parser.add_argument(
        "--experiment",
        type=Path,
        metavar="experiments/METHOD/NAME",
        help="train nothing, write the files from which PEFT's own method_comparison/MetaMathQA runs",
    )
    return parser


def run(args: Namespace) -> int:
    """Train, or say what would be trained."""
    from peft_reslora.experiments.config_file import read_config
    from peft_reslora.experiments.settings import train_settings

    settings = train_settings(read_config(find_config(args.config), args.overrides))
    if args.dry_run:
        from peft_reslora.experiments.dry_run import describe_run

        say(describe_run(settings))
        return 0
    if args.experiment:
        from peft_reslora.experiments.method_comparison import write_experiment

        write_experiment(settings, args.experiment)
        say(f"the experiment is in {args.experiment}")
        return 0
    from peft_reslora.experiments.run import result_lines, train_with

    say("\n".join(result_lines(settings, train_with(settings))))
    return 0
