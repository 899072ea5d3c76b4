"""Entry point of the `peft-reslora` command: its arguments, and which function of `peft_reslora.cli` runs them.

It stands outside the package because importing any part of the package imports torch and PEFT, which takes seconds;
here `--help` and mistyped arguments are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

SHORTCUTS = ("input", "block", "middle")
DTYPES = ("float32", "float16", "bfloat16")
_LONGEST_LINE = 1200  # characters; other libraries list all of their classes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 if what it checks does not hold.

    Raises:
        SystemExit: with code 2 for wrong usage, and 1, after one line on stderr, for what is refused.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv, argparse.Namespace(argv=argv))
    _prepare_process()
    try:
        from peft_reslora import cli

        commands = {"quickstart": cli.quickstart, "export": cli.export, "inspect": cli.inspect}
        return commands[args.command](args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        sys.exit("peft-reslora: interrupted")
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"peft-reslora: error: {_one_line(error)}")
    except Exception as error:  # what a file or config from somebody else makes other libraries raise
        sys.exit(f"peft-reslora: error: {type(error).__name__}: {_one_line(error)}")


def _one_line(message: object) -> str:
    """On one line of a length that can be read, without what would do something to the terminal."""
    text = " ".join(str(message).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]}... ({len(text):,} characters)"


def build_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(prog="peft-reslora", description="ResLoRA and MoRA for Hugging Face PEFT.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    _add_export(commands)
    _add_inspect(commands)
    return parser


def _add_quickstart(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "quickstart",
        help="train LoRA and ResLoRA on real text, export, and check the export; about 2 minutes on a CPU",
        description="Train LoRA and ResLoRA side by side on the docstrings of Python's standard library, draw both "
        "loss curves, merge, export a standard LoRA, and check it in a process without peft_reslora. Needs no network "
        "and no data file; about 2 minutes on two CPU cores.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("reslora-quickstart"), metavar="DIR", help=_default("write to")
    )
    parser.add_argument("--shortcut", choices=SHORTCUTS, default="block", help=_default("ResLoRA's shortcut"))
    parser.add_argument(
        "--steps", type=_positive, default=120, metavar="N", help=_default("training steps per method")
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=_default("random seed"))


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    size.add_argument("--rank", type=_positive, metavar="N", help="keep at most N directions per layer")
    size.add_argument("--energy", type=float, metavar="E", help="keep this share of each update's energy, in (0, 1]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=_default("type of the tensors"))
    parser.add_argument("--dry-run", action="store_true", help="print the report and write nothing")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the export as well, with the token of hf auth")
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: make the repository private")


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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


def _default(text: str) -> str:
    return f"{text} (default: %(default)s)"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


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


if __name__ == "__main__":
    sys.exit(main())
