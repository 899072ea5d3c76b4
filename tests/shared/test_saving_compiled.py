"""An adapter that transformers loads is checked when it is first used, in compiled code too."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapters import adapted
from helpers.oracle import relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from safetensors.torch import load_file, save_file

from peft_reslora import MoRAConfig, ResLoRAConfig

CONFIGS = {
    "block": lambda: ResLoRAConfig(r=2, target_modules=["q_proj"], shortcut="block"),
    "middle": lambda: ResLoRAConfig(r=2, target_modules=["q_proj"], shortcut="middle"),
    "mora": lambda: MoRAConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.quick(tuner=["middle"])
@pytest.mark.quick(tuner=["mora"], fullgraph=[True])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("tuner", CONFIGS)
def test_what_transformers_loads_is_checked_under_compile(tuner, fullgraph, tmp_path):
    torch._dynamo.reset()
    base, inputs = TINY_MODELS["llama"].make(), TINY_MODELS["llama"].inputs()
    saved = adapted(copy.deepcopy(base), CONFIGS[tuner]())
    saved.save_pretrained(tmp_path / "whole")
    loaded = copy.deepcopy(base)
    loaded.load_adapter(str(tmp_path / "whole"))
    with torch.no_grad():
        expected = output_of(saved, inputs)
        actual = output_of(torch.compile(loaded.eval(), backend="eager", fullgraph=fullgraph), inputs)
    assert relative_error(actual, expected) < 100 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        for p in loaded.parameters():
            p.mul_(1.01)
    loaded.save_pretrained(tmp_path / "trained on")  # what has been checked is not compared with its stamp again

    file = tmp_path / "whole" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(("lora_B.weight", "mora_M")))
    tensors[key] = tensors[key] * 3
    save_file(tensors, file, metadata={"format": "pt"})
    damaged = copy.deepcopy(base)
    damaged.load_adapter(str(tmp_path / "whole"))
    with pytest.raises(Exception, match="is not what was saved"), torch.no_grad():
        output_of(torch.compile(damaged.eval(), backend="eager", fullgraph=fullgraph), inputs)
    torch._dynamo.reset()
