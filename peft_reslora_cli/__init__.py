"""The `peft-reslora` command; one file per command has its arguments and what it does.

It stands outside `peft_reslora` because importing any part of that imports torch and PEFT, which takes seconds. Here
that waits until the arguments are known to be right, so that `--help` and mistyped ones are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

from peft_reslora_cli import compare, configs, export, import_, inspect, quickstart, train

# In the order of `--help`; each has `add_parser` and `run`.
COMMANDS = (quickstart, export, import_, inspect, train, compare, configs)
_LONGEST_LINE = 1200  # characters; other libraries list all of their classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 if what it checks does not hold.

    Raises:
        SystemExit: with code 2 for wrong usage, and 1, after one line on stderr, for what is refused.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(argv)
    _prepare_process()
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.exit("peft-reslora: interrupted")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"peft-reslora: error: {_one_line(error)}")
    except Exception as error:  # what a file or config from somebody else makes other libraries raise
        sys.exit(f"peft-reslora: error: {type(error).__name__}: {_one_line(error)}")


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; argparse takes what is repeated, KEY=VALUE, on one side of an option only."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv, argparse.Namespace(argv=argv))
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def build_parser() -> argparse.ArgumentParser:
    """The arguments of all commands; those of one leave its function in `args.run`."""
    parser = argparse.ArgumentParser(prog="peft-reslora", description="ResLoRA and MoRA for Hugging Face PEFT.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def _version() -> str:
    try:
        return f"peft_reslora {metadata.version('peft_reslora')}"
    except metadata.PackageNotFoundError:
        return "peft_reslora, not installed"


def _prepare_process() -> None:
    """Show this package's warnings as one line each, and nothing that other libraries log or deprecate."""
    # Read when torch is loaded. Waiting threads that spin slow training tenfold where other programs share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    sys.stderr.write(f"peft-reslora: warning: {_one_line(message)}\n")


def _one_line(message: object) -> str:
    """On one line of a length that can be read, without what would do something to the terminal."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}... ({len(text):,} characters)"
