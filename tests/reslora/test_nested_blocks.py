"""Nested ranks: for each b, outputs, gradients and merges are those of an adapter that was cut off by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.adapters import VARIANTS, tuner_layers
from helpers.gradients import assert_gradients_close
from helpers.oracle import Factors, factors_of, randomize_adapters, relative_error, run_oracle
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import FLOAT64, MODEL64, half_rounding
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_reslora import ResLoRAConfig, calibrate_merge
from peft_reslora.reslora.blocks.adalora import AdaloraBlock
from peft_reslora.training import anneal_shortcuts, rank_in_use, set_rank

pytestmark = pytest.mark.usefixtures("float64")
LLAMA = TINY_MODELS["llama"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
RANKS = {"v_proj": 2}  # others have 4
every_variant = pytest.mark.parametrize(("shortcut", "pre_num"), VARIANTS)
quick_with_one = pytest.mark.quick(shortcut=["middle"], pre_num=[1])


def config_of(shortcut: Any = "block", pre_num: int = 1, **changes: Any) -> ResLoRAConfig:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "rank_pattern": RANKS, "nested_ranks": True}
    return ResLoRAConfig(**{**fields, "shortcut": shortcut, "pre_num": pre_num, **changes})


def adapted(*args: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    return randomize_adapters(get_peft_model(LLAMA.make(), config_of(*args, **changes)))


def cut_off(factors: Factors, rank: int, alpha: float = 6, root: bool = False) -> Factors:
    """The first directions of each layer, with the scaling of a LoRA that has no others."""
    cut = {}
    for name, (A, B, _) in factors.items():
        b = min(rank, len(A))
        cut[name] = A[:b], B[:, :b], alpha / (b**0.5 if root else b)
    return cut


def gradients(model: nn.Module) -> dict[tuple[str, int], Tensor]:
    return {
        (name, i): torch.zeros_like(p.weight) if p.weight.grad is None else p.weight.grad
        for name, layer in tuner_layers(model).items()
        for i, p in enumerate((layer.lora_A["default"], layer.lora_B["default"]))
    }


def by_hand(model: nn.Module, shortcut: str, pre_num: int, rank: int, inputs: Any) -> tuple[Tensor, Any]:
    """Output and gradients by hooks on the base model."""
    factors, base = factors_of(model), copy.deepcopy(model).unload()
    base.gradient_checkpointing_disable()
    output = run_oracle(base, inputs, cut_off(factors, rank), shortcut, pre_num, output_of)
    leaves = {(name, i): factors[name][i] for name in factors for i in (0, 1)}
    found = torch.autograd.grad(output.square().mean(), list(leaves.values()))
    return output.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.quick(reentrant=[None], pre_num=[1])
@pytest.mark.quick(reentrant=[True], shortcut=["middle"], pre_num=[1])
@every_variant
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_output_and_gradients_are_those_of_the_first_directions(shortcut, pre_num, reentrant):
    """Another rank is set between each forward and its backward, in which checkpointing computes it again."""
    model, inputs = adapted(shortcut, pre_num).train(), LLAMA.inputs()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for rank in (1, 3, 4, 7):
        expected, wanted = by_hand(model, shortcut, pre_num, rank, inputs)
        model.zero_grad()
        set_rank(model, rank)
        output = output_of(model, inputs)
        assert relative_error(output, expected) < MODEL64
        set_rank(model, 2 if rank < 3 else None)
        output.square().mean().backward()
        found = gradients(model)
        assert all(not found[name, 0][rank:].any() and not found[name, 1][:, rank:].any() for name, _ in found)
        assert_gradients_close(found, wanted)


def test_without_shortcuts_it_is_dylora():
    """Each block begins a chain of its own."""
    cuts = [f"model.layers.{n}" for n in range(1, 4)]
    with pytest.warns(UserWarning, match="no shortcut at all"):
        model, inputs = adapted(chain_cuts=cuts).train(), LLAMA.inputs()
    for rank in (1, 3, 4):
        expected, wanted = by_hand(model, "block", 0, rank, inputs)
        model.zero_grad()
        set_rank(model, rank)
        output = output_of(model, inputs)
        output.square().mean().backward()
        assert relative_error(output, expected) < MODEL64
        assert_gradients_close(gradients(model), wanted)


@quick_with_one
@every_variant
def test_factors_that_hooks_load_are_the_same(shortcut, pre_num):
    """As under offloading, where only a call of the modules of A and B multiplies by them."""
    model, inputs = adapted(shortcut, pre_num), LLAMA.inputs()
    expected, _ = by_hand(model, shortcut, pre_num, 3, inputs)
    for layer in tuner_layers(model).values():
        layer.lora_A["default"].register_forward_pre_hook(lambda module, args: None)
    set_rank(model, 3)
    assert relative_error(output_of(model, inputs), expected) < MODEL64


@quick_with_one
@every_variant
def test_all_directions_are_in_use_unless_a_rank_is_set(shortcut, pre_num):
    model, inputs = adapted(shortcut, pre_num).eval(), LLAMA.inputs()
    plain = adapted(shortcut, pre_num, nested_ranks=False).eval()
    whole = output_of(plain, inputs)
    assert torch.equal(output_of(model, inputs), whole)
    set_rank(model, 2, in_training_only=True)
    assert torch.equal(output_of(model, inputs), whole)
    assert relative_error(output_of(model.train(), inputs), whole) > 1e-3
    deltas = (
        {name: layer.get_delta_weight("default") for name, layer in tuner_layers(plain).items()}
        if (shortcut == "block")
        else {}
    )
    for name, delta in deltas.items():  # merges of a step that broke off have all directions
        assert torch.equal(tuner_layers(model)[name].get_delta_weight("default"), delta)
    set_rank(model, 3)
    with rank_in_use(model.eval(), 1):
        one = output_of(model, inputs)
    with rank_in_use(model, 3):
        three = output_of(model, inputs)
    assert torch.equal(output_of(model, inputs), three)
    assert relative_error(one, three) > 1e-3


def truncated_by_hand(model: Any, rank: int, **changes: Any) -> Any:
    """A model with a plain ResLoRA adapter of this rank, which holds the first directions and what belongs to them."""
    config = copy.deepcopy(model.peft_config["default"])
    lower = config_of(
        config.shortcut,
        config.pre_num,
        r=min(rank, 4),
        rank_pattern={"v_proj": min(rank, 2)},
        nested_ranks=False,
        merge_estimator=config.merge_estimator,
        estimate=config.estimate,
        **changes,
    )
    cut = get_peft_model(copy.deepcopy(model).unload(), lower).eval()
    for name, layer in tuner_layers(model).items():
        own = tuner_layers(cut)[name]
        b = own.r["default"]
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
        own.lora_A["default"].weight.data, own.lora_B["default"].weight.data = A[:b].clone(), B[:, :b].clone()
        if "default" in layer.lora_norm:
            own.lora_norm["default"] = layer.lora_norm["default"].clone()
        if "default" in layer.lora_shortcut:
            own.lora_shortcut["default"] = layer.lora_shortcut["default"][:b].clone()
        if "default" in layer.lora_annealed:
            own.lora_annealed["default"] = layer.lora_annealed["default"].clone()
        if "default" in layer.lora_calibrated:
            own.store_calibration("default", None)
    return cut


ESTIMATES = [
    ("block", 2, "input_norm"),
    ("input", 1, "input_norm"),
    ("input", 1, "weight_norm"),
    ("input", 1, "least_squares"),
    ("middle", -1, "input_norm"),
    ("middle", 2, "weight_norm"),
    ("middle", 1, "least_squares"),
    ("middle", 1, "drop"),
]


@pytest.mark.quick(estimator=["least_squares"], shortcut=["middle"])
@pytest.mark.quick(shortcut=["block"])
@pytest.mark.parametrize(("shortcut", "pre_num", "estimator"), ESTIMATES)
def test_merges_at_a_rank_are_those_of_the_adapter_of_that_rank(shortcut, pre_num, estimator):
    model, inputs = adapted(shortcut, pre_num, merge_estimator=estimator), LLAMA.inputs()
    output_of(model.train(), inputs)  # records norms
    model.eval()
    if estimator == "least_squares":
        calibrate_merge(model, [LLAMA.inputs() for _ in range(4)])
    for rank in (1, 3, 4):
        other = truncated_by_hand(model, rank)
        expected = output_of(other.merge_and_unload(), inputs)
        with rank_in_use(model, rank):
            model.merge_adapter()
            assert relative_error(output_of(model, inputs), expected) < MODEL64
            model.unmerge_adapter()
    assert relative_error(output_of(copy.deepcopy(model).merge_and_unload(), inputs), expected) < MODEL64


@pytest.mark.quick(share=[0.5], shortcut=["middle"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("middle", -1)])
def test_annealed_adapters_can_be_cut_off_too(shortcut, pre_num, share):
    model, inputs = adapted(shortcut, pre_num, merge_estimator="weight_norm").eval(), LLAMA.inputs()
    anneal_shortcuts(model, share)
    other = truncated_by_hand(model, 3)
    with rank_in_use(model, 3):
        found, merged = output_of(model, inputs), output_of(copy.deepcopy(model).merge_and_unload(), inputs)
    assert relative_error(found, output_of(other, inputs)) < MODEL64
    assert relative_error(merged, output_of(other.merge_and_unload(), inputs)) < MODEL64
    if share == 1.0:
        assert relative_error(merged, found) < MODEL64


def test_with_rslora_the_scaling_is_that_of_a_lower_rank_too():
    model, inputs = adapted("middle", 1, use_rslora=True), LLAMA.inputs()
    base = copy.deepcopy(model).unload()
    cut = cut_off(factors_of(model), 3, root=True)
    set_rank(model, 3)
    assert relative_error(output_of(model, inputs), run_oracle(base, inputs, cut, "middle", 1, output_of)) < MODEL64


@quick_with_one
@every_variant
def test_saved_and_loaded_it_holds_the_same_adapters(shortcut, pre_num, tmp_path):
    model, inputs = adapted(shortcut, pre_num).eval(), LLAMA.inputs()
    with rank_in_use(model, 3):
        expected = output_of(model, inputs)
        model.save_pretrained(tmp_path)  # all directions, whatever is in use
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path).eval()
    assert loaded.peft_config["default"].nested_ranks
    assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < MODEL64
    set_rank(loaded, 3)
    assert relative_error(output_of(loaded, inputs), expected) < MODEL64
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        set_rank(loaded, 1)
        assert relative_error(output_of(twin, inputs), expected) < MODEL64
        set_rank(loaded, 3)


@pytest.mark.quick(dtype=[torch.bfloat16], shortcut=["block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("block", 1), ("middle", 1)])
def test_half_precision_and_autocast_stay_close(shortcut, pre_num, dtype):
    model, inputs = adapted(shortcut, pre_num).float(), LLAMA.inputs()
    set_rank(model, 3)
    expected, bound = output_of(model, inputs), half_rounding(120, dtype)
    with torch.autocast("cpu", dtype):
        assert relative_error(output_of(model, inputs), expected) < bound
    half = model.to(dtype)
    set_rank(half, 3)
    assert relative_error(output_of(half, inputs), expected) < bound


@pytest.mark.quick(shortcut=["middle"])
@pytest.mark.parametrize(("shortcut", "pre_num"), [("input", 1), ("block", -1), ("middle", 1)])
def test_compiled_once_for_all_ranks(shortcut, pre_num):
    torch._dynamo.reset()
    model, inputs = adapted(shortcut, pre_num, target_modules=["q_proj"], rank_pattern={}), LLAMA.inputs()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step, rank in enumerate((2, 1, 4, 3)):
        for candidate in (model, eager):
            set_rank(candidate, rank)
            candidate.zero_grad()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = output_of(compiled, inputs)
            found.square().mean().backward()
        expected = output_of(eager, inputs)
        expected.square().mean().backward()
        assert relative_error(found, expected) < MODEL64
        assert_gradients_close(gradients(model), gradients(eager))
    torch._dynamo.reset()


def test_what_has_no_nested_ranks_is_refused():
    model = adapted(nested_ranks=False)
    with pytest.raises(ValueError, match=r"Adapter 'default' is no ResLoRA adapter with nested_ranks=True"):
        set_rank(model, 2)
    with pytest.raises(ValueError, match=r"Adapter 'other' is no ResLoRA adapter"), rank_in_use(adapted(), 2, "other"):
        pass
    for rank in (0, -1, True, 1.0):
        with pytest.raises(ValueError, match="must be a positive integer, or None for all"):
            set_rank(adapted(), rank)
    with pytest.raises(ValueError, match=r"nested_ranks=True with use_dora=True.*choose one"):
        config_of(use_dora=True)
    with pytest.raises(ValueError, match=r"nested_ranks=True with total_step \(AdaLoRA\).*choose one"):
        config_of(r=8, rank_pattern={}, total_step=50)
    with pytest.raises(ValueError, match="nested_ranks='yes'"):
        config_of(nested_ranks="yes")


def test_a_weighted_adapter_has_no_order_of_directions():
    model = adapted(rank_pattern={})
    model.add_weighted_adapter(["default"], [0.5], "scaled", combination_type="cat")
    assert not model.peft_config["scaled"].nested_ranks
    assert model.peft_config["default"].nested_ranks
    with pytest.raises(ValueError, match="Adapter 'scaled' is no ResLoRA adapter with nested_ranks=True"):
        set_rank(model, 1, "scaled")


def test_adalora_keeps_its_weights_beside_b():
    """The hook through which nested ranks and AdaLoRA weigh a hidden state."""
    model = adapted(nested_ranks=False, r=8, rank_pattern={}, init_r=4, target_r=2, total_step=9)
    block = next(iter(tuner_layers(model).values())).block_of("default")
    hidden = torch.randn(3, 4)
    assert type(block) is AdaloraBlock
    assert relative_error(block.weigh(hidden), hidden * block.singular_values.flatten()) < FLOAT64
