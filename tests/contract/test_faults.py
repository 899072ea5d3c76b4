"""Killed saves, damaged files, interrupted and concurrent passes: an error or the right result, never a wrong one."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from helpers.adapters import TUNERS, base_and_adapted
from helpers.gradients import assert_gradients_close, gradients
from helpers.oracle import relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import rounding
from peft import PeftModel
from safetensors.torch import load_file, save_file

TINY = TINY_MODELS["llama"]
WEIGHTS = "adapter_model.safetensors"


# A child saves two versions of an adapter over each other, again and again, until it is killed.
KILLED_AT_RANDOM = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from peft import PeftModel, get_peft_model
from peft_reslora import MoRAConfig, ResLoRAConfig

torch.set_num_threads(1)
folder = Path(sys.argv[1])
layers = lambda: torch.nn.Sequential(*(torch.nn.Linear(30, 30) for _ in range(3)))
configs = {"mora": MoRAConfig(r=2, target_modules=["0", "1", "2"])}
for shortcut in ("input", "block", "middle"):
    configs[shortcut] = ResLoRAConfig(r=2, target_modules=["0", "1", "2"], shortcut=shortcut)
model = get_peft_model(layers(), configs[sys.argv[2]])
parameters = [p for p in model.parameters() if p.requires_grad]

def save(version):
    for parameter in parameters:
        parameter.data.fill_(version)
    model.save_pretrained(folder)

save(1.0)
seen = set()
for _ in range(50):
    started = folder.with_name("started")
    child = os.fork()
    if child == 0:
        while True:
            save(1.0)
            started.touch()
            save(2.0)
    while not started.exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    started.unlink()
    loaded = PeftModel.from_pretrained(layers(), folder)
    versions = {float(v) for n, p in loaded.named_parameters() if "lora_" in n or "mora_" in n for v in p.unique()}
    assert len(versions) == 1 and versions <= {1.0, 2.0}, versions
    seen |= versions
for left in folder.glob(".adapter*"):
    os.utime(left, (0, 0))
save(2.0)
found = {path.name for path in folder.iterdir() if "adapter" in path.name}
assert found == {"adapter_config.json", "adapter_model.safetensors"}, found
print(sorted(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the rounds fork")
@pytest.mark.parametrize("tuner", ["middle", "mora"])
def test_a_save_that_is_killed_leaves_a_whole_version(tuner, tmp_path):
    arguments = [sys.executable, "-c", KILLED_AT_RANDOM, str(tmp_path / "adapter"), tuner]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[1.0, 2.0]"


def flip(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_flipped_bit_anywhere_is_noticed(tuner, tmp_path):
    """Where a flip changes nothing that is read, such as padding, the tensors are those that were saved."""
    base, model = base_and_adapted("llama", tuner)
    model.save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    data, saved = file.read_bytes(), load_file(file)
    header = 8 + int.from_bytes(data[:8], "little")
    source = random.Random(0)
    positions = [*range(8), *source.sample(range(8, header), 25), *source.sample(range(header, len(data)), 12)]
    refused = 0
    for position in positions:
        file.write_bytes(flip(data, position, source.randrange(8)))
        try:
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        except ValueError as error:
            refused += str(file) in str(error)
        else:
            assert position < header
            assert all(torch.equal(tensor, saved[name]) for name, tensor in load_file(file).items())
    assert refused >= len(positions) - 5
    for length in (0, 4, header - 1, header, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or no safetensors file"):
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    file.write_bytes(data)
    PeftModel.from_pretrained(base, tmp_path)


def test_the_commands_notice_a_flipped_bit(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    _, model = base_and_adapted("llama", "block")
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    data = file.read_bytes()
    file.write_bytes(flip(data, len(data) - 1, 0))
    for arguments in (["inspect", "adapter"], ["export", "adapter", "lora"]):
        done = command(*arguments)
        assert done.code == 1
        assert "its tensors are not those that were saved" in done.err
    assert not (tmp_path / "lora").exists()


@torch.no_grad()
def test_tensors_that_were_changed_on_purpose_load(tmp_path):
    """Another program that rewrites the file leaves no seal."""
    base, model = base_and_adapted("llama", "block")
    model.save_pretrained(tmp_path)
    halved = {name: tensor / 2 for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(halved, tmp_path / WEIGHTS, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(base, tmp_path)
    for (_, p), (_, q) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        if "lora_" in _:
            assert torch.equal(p, q / 2)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config | {"peft_type": "NOTHING"}, "NOTHING"),
        (lambda config: config | {"r": 5}, r"default.*layers\.\d.*(shape|\(3, )"),
        (lambda config: config | {"target_modules": ["q_proj"]}, r"default.*(not in the model|belongs to no).*layers"),
    ],
)
def test_another_config_is_refused(tuner, change, message, tmp_path):
    base, model = base_and_adapted("llama", tuner)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises((ValueError, RuntimeError, KeyError), match=message):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_another_base_is_refused(tuner, tmp_path):
    _, model = base_and_adapted("llama", tuner)
    model.save_pretrained(tmp_path)
    config = TINY.make().config
    for field, value in (("hidden_size", 32), ("num_hidden_layers", 3), ("num_hidden_layers", 5)):
        other = copy.deepcopy(config)
        setattr(other, field, value)
        with pytest.raises((ValueError, RuntimeError), match=r"does not fit adapter 'default'.*layers\.\d"):
            PeftModel.from_pretrained(type(TINY.make())(other), tmp_path)


@pytest.mark.parametrize("tuner", TUNERS)
def test_threads_share_a_model(tuner):
    _, model = base_and_adapted("llama", tuner)
    inputs = [{"input_ids": torch.randint(1, 53, (1 + i, 5 + i))} for i in range(4)]
    with torch.no_grad():
        expected = [output_of(model, i) for i in inputs]
    found: dict[int, list[torch.Tensor]] = {}

    @torch.no_grad()
    def run(i: int) -> None:
        found[i] = [output_of(model, inputs[i]) for _ in range(15)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in found.items():
        assert len(outputs) == 15
        assert all(relative_error(output, expected[i]) < rounding(model) for output in outputs)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_after_an_interrupted_one_has_its_own_gradient(tuner, checkpointing):
    _, model = base_and_adapted("llama", tuner)
    plain = copy.deepcopy(model).train()
    model.train()
    inputs = [{"input_ids": torch.randint(1, 53, shape)} for shape in ((3, 4), (2, 7))]
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        output_of(model, inputs[0])
    handle.remove()
    for candidate in (plain, model):
        output_of(candidate, inputs[1]).square().mean().backward()
    assert_gradients_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("tuner", TUNERS)
def test_training_after_inference_mode(tuner):
    _, model = base_and_adapted("llama", tuner)
    plain = copy.deepcopy(model).train()
    inputs = {"input_ids": torch.randint(1, 53, (2, 7))}
    with torch.inference_mode():
        output_of(model, inputs)
    for candidate in (plain, model.train()):
        output_of(candidate, inputs).square().mean().backward()
    assert_gradients_close(gradients(model), gradients(plain))
