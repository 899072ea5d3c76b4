"""One process of `accelerate launch`: runs a script of `examples` on a CPU, under its engine."""

from __future__ import annotations

import runpy
import sys

from helpers.engine_worker import start_accelerate

if __name__ == "__main__":
    start_accelerate()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
