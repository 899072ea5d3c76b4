"""`python -m peft_reslora`: the `peft-reslora` command."""

import sys

from peft_reslora_cli import main

sys.exit(main())
