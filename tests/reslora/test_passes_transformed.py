"""What else may stand around a layer: other shapes, function transforms, inference mode, compiled code."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from helpers.encoders import (
    Encoder,
    adapted_encoder,
    assert_same,
    backwards,
    by_torch,
    checkpointed,
    data,
    encoder,
    every_taking,
    every_variant,
)
from helpers.oracle import relative_error
from helpers.tolerances import FLOAT64


@every_variant
def test_a_single_vector_is_an_input(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    rows = backwards(copy.deepcopy(model), data(1, 5))
    assert_same(backwards(model, data(5)), rows)


@every_variant
def test_function_transforms_see_the_layers(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x = data().detach()

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = backwards(copy.deepcopy(model), x)
    assert_same(torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()}, x), expected)
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
        {n: p.detach() for n, p in parameters.items()}, x
    )
    assert_same({n: g.sum(0) for n, g in by_sample.items()}, expected)
    _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    loss(parameters, leaf).backward()
    assert relative_error(tangent, leaf.grad.sum()) < FLOAT64


@every_variant
def test_inputs_made_in_inference_mode(shortcut, pre_num):
    model = encoder(shortcut, pre_num)
    with torch.inference_mode():
        x = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x.clone())
    with torch.inference_mode():
        assert relative_error(model(x), expected) < FLOAT64


@pytest.mark.slow
@every_variant
def test_compiled_blocks_in_eager_regions_are_right_or_refused(shortcut, pre_num):
    torch._dynamo.reset()
    model = encoder(shortcut, pre_num)
    expected = backwards(copy.deepcopy(model), data())
    twin = checkpointed(model, by_torch(use_reentrant=False))
    for layer in twin.base_model.model.layers:
        layer.compile(backend="aot_eager")
    try:
        actual = backwards(twin, data())
    except RuntimeError as error:
        assert "compile the whole model" in str(error)  # noqa: PT017
        assert shortcut != "block"
    else:
        assert_same(actual, expected)
    torch._dynamo.reset()


@pytest.mark.slow
@every_taking
def test_compiled_code_with_breaks_on_two_threads(shortcut, pre_num):
    class Breaking(Encoder):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = adapted_encoder(Breaking(), shortcut, pre_num, merge_estimator="weight_norm").eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    inputs = [data(seed=seed).detach() for seed in range(8)]
    expected = [model(x).detach() for x in inputs]
    compiled(inputs[0])
    faults: list[Any] = []

    def work() -> None:
        for turn in range(200):
            x, output = inputs[turn % 8], expected[turn % 8]
            try:
                error = relative_error(compiled(x), output)
            except Exception as exception:
                faults.append(exception)
            else:
                if error > FLOAT64:
                    faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch._dynamo.reset()
    assert faults == []
