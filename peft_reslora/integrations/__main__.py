"""`python -m peft_reslora.integrations ms_swift` prints where that joint lies, for trainers that ask for a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> None:
    """Print the path of a joint's file; nothing of the trainer is imported."""
    parser = argparse.ArgumentParser(prog="python -m peft_reslora.integrations", description=__doc__)
    parser.add_argument("joint", choices=["ms_swift"])
    sys.stdout.write(f"{FOLDER / parser.parse_args().joint}.py\n")


if __name__ == "__main__":
    main()
