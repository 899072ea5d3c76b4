"""Any adapter as a standard LoRA, checked in plain PEFT, and the commands of the programs that read it.

python examples/export_and_serve.py ADAPTER --model BASE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import peft_reslora

COMMANDS = """
vLLM:       vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={lora}
SGLang:     python -m sglang.launch_server --model-path {base} --lora-paths tuned={lora}
llama.cpp:  python convert_lora_to_gguf.py {lora} --base {base} --outfile tuned.gguf
            llama-server -m base.gguf --lora tuned.gguf
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", default="lora")
    parser.add_argument("--energy", type=float, help="for MoRA rotation and decoupling, which have full rank: 0.99")
    options = parser.parse_args(arguments)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), options.adapter).eval()
    exported = peft_reslora.save_as_lora(options.output, model, energy=options.energy)
    print(exported.report)

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(options.model), options.output).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected, got = model(input_ids=ids).logits, plain(input_ids=ids).logits
    print(f"Relative difference of the logits: {(got - expected).norm() / expected.norm():.1e}")
    print(COMMANDS.format(base=options.model, lora=options.output, rank=exported.config.r))


if __name__ == "__main__":
    main()
