"""Forward and gradients of every shortcut equal the equations, computed by hooks in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.adapters import VARIANTS, base_and_adapted
from helpers.gradients import assert_gradients_close
from helpers.oracle import factors_of, randomize_adapters, relative_error, run_oracle
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import MODEL64, half_rounding, rounding
from peft import get_peft_model
from torch import nn

from peft_reslora import ResLoRAConfig

STEPS = 4 * 30  # operations after each other in the tiny Llama's layers, each of which rounds its result


def compare_with_oracle(
    base: nn.Module, model: nn.Module, inputs: dict, shortcut: str, pre_num: int, **options
) -> None:
    double = next(model.parameters()).dtype == torch.float64
    factors = factors_of(model)
    expected = run_oracle(base, inputs, factors, shortcut, pre_num, output_of, **options)
    actual = output_of(model, inputs)
    assert relative_error(actual, expected) < (MODEL64 if double else rounding(model))
    assert relative_error(output_of(base, inputs), expected) > 1e-3, "the adapter does too little to show anything"

    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    grads, wanted = {}, {}
    for name, leaves in factors.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        for part, leaf in zip("AB", leaves, strict=False):
            grads[name, part] = getattr(layer, f"lora_{part}")["default"].weight.grad
            wanted[name, part] = leaf.grad
    assert_gradients_close(grads, wanted)


@pytest.mark.quick(dtype=[torch.float64], pre_num=[-1])
@pytest.mark.quick(dtype=[torch.float64], shortcut=["input"])
@pytest.mark.quick(name=["llama"])
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradients_equal_the_equations(dtype, name, shortcut, pre_num):
    base, model = (module.to(dtype) for module in base_and_adapted(name, shortcut, pre_num))
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in TINY_MODELS[name].inputs().items()}
    compare_with_oracle(base, model, inputs, shortcut, pre_num)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_rslora_and_alpha_pattern_scale_each_block(shortcut, pre_num):
    base, model = base_and_adapted(
        "llama", shortcut, pre_num, use_rslora=True, alpha_pattern={"layers.1.mlp.up_proj": 11}
    )
    compare_with_oracle(base, model, TINY_MODELS["llama"].inputs(), shortcut, pre_num)


@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("block", 1), ("block", -1)])
def test_ranks_may_differ_within_a_chain(shortcut, pre_num):
    pattern = {"layers.1.self_attn.q_proj": 5, "layers.2.mlp.down_proj": 1}
    base, model = base_and_adapted("llama", shortcut, pre_num, rank_pattern=pattern)
    compare_with_oracle(base, model, TINY_MODELS["llama"].inputs(), shortcut, pre_num)


class _NamedMask(nn.Module):
    """A dropout whose mask depends on the layer's name alone, so that the oracle can apply the same one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return named_mask(self.name, x)


def named_mask(name: str, x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return x * (torch.rand(x.shape, generator=generator) > 0.3).to(x.dtype) / 0.7


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_dropout_masks_once_per_block_input(shortcut, pre_num):
    """input: the sum x_n + x_{n-1}; block: x_n for all terms; middle: each x_{n-k} in its own layer."""
    base, model = base_and_adapted("bert", shortcut, pre_num, lora_dropout=0.3)
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            assert isinstance(module.lora_dropout["default"], nn.Dropout)
            module.lora_dropout["default"] = _NamedMask(name.removeprefix("base_model.model."))
    compare_with_oracle(base, model, TINY_MODELS["bert"].inputs(), shortcut, pre_num, mask=named_mask)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_several_active_adapters_add_their_deltas(shortcut, pre_num):
    """Each with its own shortcut: the deltas are applied together, each from the inputs it sees."""
    base, model = base_and_adapted("llama", shortcut, pre_num)
    tiny = TINY_MODELS["llama"]
    inputs = tiny.inputs()
    model.add_adapter("second", ResLoRAConfig(r=2, target_modules=["q_proj", "up_proj"], shortcut="block", pre_num=2))
    randomize_adapters(model, seed=5)
    model.base_model.set_adapter(["default", "second"])
    block_factors = factors_of(model, "second")

    def run_with_block(oracle_base: nn.Module, oracle_inputs: dict) -> torch.Tensor:
        return run_oracle(oracle_base, oracle_inputs, block_factors, "block", 2, output_of)

    expected = run_oracle(base, inputs, factors_of(model), shortcut, pre_num, lambda m, i: _both(m, i, block_factors))
    assert relative_error(output_of(model, inputs), expected) < rounding(model)


def _both(hooked: nn.Module, inputs: dict, block_factors) -> torch.Tensor:
    """Adds the block adapter's hooks to a model that already has the other's."""
    modules = dict(hooked.named_modules())
    handles = []
    for role in ("self_attn.q_proj", "mlp.up_proj"):
        for n in range(4):

            def hook(module, args, output, role=role, n=n):
                for k in range(max(0, n - 2), n + 1):
                    A, B, s = block_factors[f"model.layers.{k}.{role}"]
                    output = output + s * args[0] @ A.T @ B.T
                return output

            handles.append(modules[f"model.layers.{n}.{role}"].register_forward_hook(hook))
    return output_of(hooked, inputs)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_mixed_batch_equals_each_adapter_alone(shortcut, pre_num):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    targets = TINY_MODELS["llama"].targets
    model.add_adapter("other", ResLoRAConfig(r=2, target_modules=targets, shortcut="middle", pre_num=-1))
    randomize_adapters(model, seed=5)
    ids = torch.randint(1, 53, (3, 6))
    expected = []
    with torch.no_grad():
        for row, adapter in zip(ids, ["default", "other", None], strict=True):
            if adapter is None:
                with model.disable_adapter():
                    expected.append(model(input_ids=row[None]).logits)
            else:
                model.set_adapter(adapter)
                expected.append(model(input_ids=row[None]).logits)
        actual = model(input_ids=ids, adapter_names=["default", "other", "__base__"]).logits
    assert relative_error(actual, torch.cat(expected)) < rounding(model)


@pytest.mark.quick(name=["llama"])
@pytest.mark.quick(pre_num=[-1])
@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.usefixtures("float64")  # where tokens nearly tie, rounding would choose
def test_generation_with_a_cache_equals_full_forwards(name, shortcut, pre_num):
    _, model = base_and_adapted(name, shortcut, pre_num)
    ids = torch.randint(3, 53, (2, 5))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        cached = model.generate(input_ids=ids, return_dict_in_generate=True, use_cache=True, **options)
        full = model.generate(input_ids=ids, return_dict_in_generate=True, use_cache=False, **options)
    assert torch.equal(cached.sequences, full.sequences)
    assert relative_error(torch.stack(cached.logits), torch.stack(full.logits)) < MODEL64


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_batch_and_length_may_change_between_calls(shortcut, pre_num):
    base, model = base_and_adapted("llama", shortcut, pre_num)
    for batch, length in ((2, 7), (1, 3), (4, 5)):
        inputs = {"input_ids": torch.randint(1, 53, (batch, length))}
        model.zero_grad()
        compare_with_oracle(base, model, inputs, shortcut, pre_num)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
def test_the_untrained_adapter_changes_nothing(shortcut, pre_num):
    tiny = TINY_MODELS["llama"]
    base, inputs = tiny.make(), tiny.inputs()
    config = ResLoRAConfig(target_modules=tiny.targets, shortcut=shortcut, pre_num=pre_num)
    model = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(output_of(model, inputs), output_of(base, inputs))


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.quick(autocast_adapter_dtype=[True])
@pytest.mark.quick(pre_num=[-1])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_bfloat16_base_stays_close_to_float32(shortcut, pre_num, autocast_adapter_dtype):
    base, model = base_and_adapted("llama", shortcut, pre_num)
    inputs = TINY_MODELS["llama"].inputs()
    expected = output_of(model, inputs)
    half = get_peft_model(
        copy.deepcopy(base).bfloat16(), model.peft_config["default"], autocast_adapter_dtype=autocast_adapter_dtype
    )
    randomize_adapters(half)
    dtype = half.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype
    assert dtype == (torch.float32 if autocast_adapter_dtype else torch.bfloat16)
    actual = output_of(half, inputs)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) < half_rounding(STEPS, torch.bfloat16)
    actual.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


@pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(shortcut, pre_num, dtype):
    _, model = base_and_adapted("llama", shortcut, pre_num)
    inputs = TINY_MODELS["llama"].inputs()
    expected = output_of(model, inputs)
    with torch.autocast("cpu", dtype):
        actual = output_of(model, inputs)
    assert relative_error(actual, expected) < half_rounding(STEPS, dtype)
