"""`python -m peft_reslora_cli`: the `peft-reslora` command."""

import sys

from peft_reslora_cli import main

if __name__ == "__main__":
    sys.exit(main())
