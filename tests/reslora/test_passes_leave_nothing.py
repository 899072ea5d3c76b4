"""What a pass, a fault or a model that is gone leaves behind: nothing."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from helpers.encoders import Encoder, adapted_encoder, by_torch, checkpointed, data, encoder, every_variant
from helpers.oracle import relative_error
from helpers.tolerances import FLOAT64
from peft import LoraConfig, get_peft_model
from torch import nn


@every_variant
@pytest.mark.parametrize("mode", ["plain", "reentrant", "non-reentrant"])
def test_an_exception_in_mid_forward_leaves_nothing(shortcut, pre_num, mode):
    model = encoder(shortcut, pre_num)
    if mode != "plain":
        model = checkpointed(model, by_torch(mode == "reentrant"))
    seen: list[weakref.ref[torch.Tensor]] = []

    class Fault(Exception):
        pass

    def fail(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise Fault

    def note(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        seen.extend(weakref.ref(t) for t in (args[0], output))

    layers = model.base_model.model.layers
    for layer in layers:
        layer.up.register_forward_hook(note)
        layer.down.register_forward_hook(note)
    gc.collect()
    gc.disable()
    try:
        for failing in range(4):
            seen.clear()
            handle = layers[failing].register_forward_hook(fail)
            with pytest.raises(Fault):
                model(data())
            handle.remove()
            assert len(seen) == 4 * (failing + 1)
            assert [ref() for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
    expected = encoder(shortcut, pre_num)(data(seed=3))
    assert relative_error(model(data(seed=3)), expected) < FLOAT64


@every_variant
def test_an_interrupt_leaves_no_trace_in_the_next_pass(shortcut, pre_num):
    """Hooks do not run after a KeyboardInterrupt."""
    model = encoder(shortcut, pre_num)

    def interrupt(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        raise KeyboardInterrupt

    base = model.base_model.model
    handle = base.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        base(data())
    handle.remove()
    from peft_reslora.reslora.passes import _running

    assert relative_error(base(data(seed=3)), encoder(shortcut, pre_num)(data(seed=3))) < FLOAT64
    assert _running.scopes == []


@every_variant
def test_a_deleted_model_is_freed_at_once(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    model(data()).sum().backward()
    parts = [weakref.ref(module) for module in model.base_model.model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()


@every_variant
def test_one_block_is_saved_alone(shortcut, pre_num):
    """As by checkpoints of parts, and by engines that send blocks to other processes."""
    sizes = {}
    for depth in (2, 8):
        torch.manual_seed(0)
        model = adapted_encoder(Encoder(depth), shortcut, pre_num)
        sizes[depth] = len(pickle.dumps(model.base_model.model.layers[1]))
    assert sizes[8] < 1.5 * sizes[2]


@every_variant
def test_doorways_go_with_the_adapter(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    unloaded = model.merge_and_unload() if shortcut == "block" else model.unload()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())
    assert b"peft_reslora" not in pickle.dumps(unloaded)


def test_no_more_is_held_than_by_lora():
    """The frozen model and LoRA free at once; so the tests above show something."""
    torch.manual_seed(0)
    model = get_peft_model(Encoder(), LoraConfig(r=2, target_modules=["up", "down"]))
    part = weakref.ref(model.base_model.model.layers[1])
    gc.collect()
    gc.disable()
    try:
        del model
        assert part() is None
    finally:
        gc.enable()
