"""torch.compile with fullgraph=True: no graph break, no recompilation, and the results of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.gradients import assert_gradients_close, gradients
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import llama, output_of
from helpers.tolerances import MODEL64, rounding
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig

pytestmark = pytest.mark.usefixtures("float64")
TUNERS: dict[str, dict[str, Any]] = {
    "input": {"shortcut": "input"},
    "block": {"shortcut": "block"},
    "block-all": {"shortcut": "block", "pre_num": -1},
    "middle": {"shortcut": "middle"},
    "middle-all": {"shortcut": "middle", "pre_num": -1},
    "sharing": {"mora_type": "sharing"},
    "decoupling": {"mora_type": "decoupling"},
    "rotation": {"mora_type": "rotation"},
}


def model_of(tuner: str) -> nn.Module:
    config = llama().config
    config.num_hidden_layers = 3
    fields = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], **TUNERS[tuner]}
    adapter = MoRAConfig(**fields) if "mora_type" in fields else ResLoRAConfig(**fields)
    torch.manual_seed(0)
    return randomize_adapters(get_peft_model(LlamaForCausalLM(config), adapter))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare_steps(eager: nn.Module, backend: str) -> None:
    # Inductor has sines, cosines and square roots of its own, and Llama takes them in float32.
    bound = rounding(eager, torch.float32) if backend == "inductor" else MODEL64
    compiled_model = copy.deepcopy(eager)
    compiled = torch.compile(compiled_model, fullgraph=True, dynamic=True, backend=backend)
    for step, batch in enumerate((2, 2, 3, 5)):
        inputs = {"input_ids": torch.randint(1, 53, (batch, 7))}
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            actual = output_of(compiled, inputs)
            actual.square().mean().backward()
        expected = output_of(eager, inputs)
        expected.square().mean().backward()
        assert relative_error(actual, expected) < bound
        assert_gradients_close(gradients(compiled_model), gradients(eager), bound=2 * bound)
        for model in (eager, compiled_model):
            model.zero_grad()
    for norms, expected_norms in zip(compiled_model.buffers(), eager.buffers(), strict=True):
        assert torch.allclose(norms, expected_norms, rtol=rounding(40))  # they are float32


@pytest.mark.support("torch.compile, fullgraph, changing batch size")
@pytest.mark.quick(tuner=["middle"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_training_compiles_whole_and_once(tuner):
    compare_steps(model_of(tuner).train(), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["input", "block", "middle"])
def test_training_compiles_with_inductor(tuner):
    compare_steps(model_of(tuner).train(), "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["input", "block", "middle"])
def test_compiled_blocks_may_stand_beside_eager_ones(tuner):
    """As where the compiler gives up on a block, or where only some are compiled."""
    model = model_of(tuner).train()
    eager = copy.deepcopy(model)
    model.base_model.model.model.layers[1].compile(backend="aot_eager")
    inputs = {"input_ids": torch.randint(1, 53, (2, 7))}
    for candidate in (model, eager):
        output_of(candidate, inputs).square().mean().backward()
    assert_gradients_close(gradients(model), gradients(eager))


@pytest.mark.slow
@pytest.mark.support("torch.compile with checkpointing (graph breaks in transformers)")
@pytest.mark.parametrize("tuner", ["input", "block", "middle", "rotation"])
def test_compiled_models_may_be_checkpointed(tuner):
    """With graph breaks, which transformers' own code makes there."""
    model = model_of(tuner).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    eager = copy.deepcopy(model)
    inputs = {"input_ids": torch.randint(1, 53, (2, 7))}
    for candidate, run in ((model, torch.compile(model, backend="aot_eager")), (eager, eager)):
        output_of(run, inputs).square().mean().backward()
        assert gradients(candidate)
    assert_gradients_close(gradients(model), gradients(eager))


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["input", "block", "middle", "rotation"])
def test_inference_compiles_whole_and_once(tuner):
    eager = model_of(tuner).eval()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for step, batch in enumerate((2, 3, 4)):
            inputs = {"input_ids": torch.randint(1, 53, (batch, 7))}
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                assert relative_error(output_of(compiled, inputs), output_of(eager, inputs)) < MODEL64
