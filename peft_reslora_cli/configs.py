"""`peft-reslora configs`: the YAML files that come with the package."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from peft_reslora_cli.arguments import Commands
from peft_reslora_cli.config_files import find_config, list_configs
from peft_reslora_cli.output import say

_KINDS = ("train", "compare", "accelerate")


def add_parser(commands: Commands) -> ArgumentParser:
    """The arguments."""
    parser = commands.add_parser(
        "configs",
        help="list the configs that come with the package, with one line each",
        description="List the YAML files that come with the package. Their names go where a command takes a CONFIG.",
    )
    parser.add_argument("kind", nargs="?", choices=_KINDS, help="only these (default: all)")
    return parser


def run(args: Namespace) -> int:
    """Print the name and the first line of each."""
    names = [name for kind in ([args.kind] if args.kind else _KINDS) for name in list_configs(kind)]
    width = max(map(len, names), default=0)
    say("\n".join(f"{name:<{width}}  {_first_line(name)}" for name in names))
    return 0


def _first_line(name: str) -> str:
    """What the config does, by its header."""
    with find_config(name).open(encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()
