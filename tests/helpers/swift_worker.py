"""ms-swift's commands in a process of their own, as it changes PEFT's classes: a JSON list of lists of arguments."""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    from swift.pipelines import export_main, infer_main, sft_main

    commands = {"sft": sft_main, "export": export_main, "infer": infer_main}
    for name, *arguments in json.loads(sys.argv[1]):
        commands[name](arguments)
