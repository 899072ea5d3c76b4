"""Fused experts and other parameters (`target_parameters`): each expert has the sum of its own blocks, Eq. 3."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from helpers.experts import (
    MIXTURES,
    adapted_mixture,
    expected_logits,
    merged_weights,
    mixture,
    randomized,
    tokens,
    values_of,
)
from helpers.gradients import assert_gradients_close
from helpers.oracle import relative_error
from helpers.refusals import refuse
from helpers.tolerances import FLOAT64, MODEL64, half_rounding, rounding
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_reslora import ResLoRAConfig, describe_chains, merge_report
from peft_reslora.optim import factor_pairs
from peft_reslora.training import LayerGates, merge_and_restart

CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}
EVERY_MIXTURE = pytest.mark.parametrize("name", MIXTURES)


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def gradients_of(output: torch.Tensor, model: PeftModel | None, values: dict[str, torch.Tensor]) -> dict[str, Any]:
    output.double().square().sum().backward()
    if model is None:
        return {name: value.grad for name, value in values.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return dict(zip(values, (p.grad for p in trained), strict=True))


@pytest.mark.quick(pre_num=[1], checkpointing=["none"])
@pytest.mark.quick(pre_num=[-1], checkpointing=["reentrant"])
@EVERY_MIXTURE
@pytest.mark.parametrize("pre_num", [1, 2, -1])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_output_and_gradients_are_those_of_dense_weights(name, pre_num, checkpointing):
    base = mixture(name)
    model = adapted_mixture(copy.deepcopy(base), pre_num=pre_num).train()
    values = values_of(model)
    if (use_reentrant := CHECKPOINTING[checkpointing]) is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    expected, actual = expected_logits(base, merged_weights(base, values, pre_num)), logits(model)
    assert relative_error(actual, expected) < MODEL64
    assert relative_error(actual, logits(base)) > 0.1
    assert_gradients_close(gradients_of(actual, model, values), gradients_of(expected, None, values))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_name_parameters_of_one_layer(field):
    base, path = mixture("qwen3_moe"), "model.layers.1.mlp.experts.down_proj"
    with warnings.catch_warnings():  # PEFT 0.21.2 says that what it has used is ignored
        warnings.simplefilter("ignore")
        model = adapted_mixture(copy.deepcopy(base), pre_num=-1, **{field: {"layers.1.mlp.experts.down_proj": 3}})
        alike = adapted_mixture(copy.deepcopy(base), pre_num=-1, alpha_pattern={"layers.1.mlp.experts.down_proj": 5})
    values = values_of(model)
    assert relative_error(logits(model), expected_logits(base, merged_weights(base, values, -1))) < MODEL64
    if field == "alpha_pattern":
        values = values_of(alike)
        expected = expected_logits(base, merged_weights(base, values, -1, {path: 5}))
        assert relative_error(logits(alike), expected) < MODEL64


@pytest.mark.quick(name=["gpt_oss"])
@EVERY_MIXTURE
def test_chains_tell_the_parameters_of_one_module_apart(name):
    base = mixture(name)
    config = ResLoRAConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    before = describe_chains(base, config)
    model = get_peft_model(base, config)
    assert set(describe_chains(model).roles) == set(before.roles)
    roles = {role.name.removeprefix("model.layers.*."): [len(chain) for chain in role.chains] for role in before.roles}
    assert roles == {"self_attn.q_proj": [4], "mlp.experts.gate_up_proj": [4], "mlp.experts.down_proj": [4]}
    assert not describe_chains(model, batch={"input_ids": tokens()}).findings


def test_a_chain_ends_where_a_parameter_between_is_not_targeted():
    names = [f"layers.{n}.mlp.experts.down_proj" for n in (0, 1, 3)]
    config = ResLoRAConfig(target_modules=[], target_parameters=names)
    model = get_peft_model(mixture("mixtral"), config)
    assert [len(chain) for chain in describe_chains(model).chains] == [2, 1]
    assert config.chain_cuts == ["model.layers.3"]


def test_a_chain_ends_there_too_where_its_module_has_another_parameter_adapted():
    names = [f"layers.{n}.mlp.experts.down_proj" for n in (0, 1, 3)]
    config = ResLoRAConfig(target_modules=[], target_parameters=["experts.gate_up_proj", *names])
    base = mixture("mixtral")
    before = describe_chains(base, config)
    after = describe_chains(get_peft_model(base, config))
    for table in (before, after):
        assert sorted(len(chain) for chain in table.chains) == [1, 2, 4]


@pytest.mark.quick(name=["gpt_oss"])
@EVERY_MIXTURE
def test_merges_are_exact_and_undone_bit_for_bit(name):
    base = mixture(name)
    model = adapted_mixture(copy.deepcopy(base), pre_num=2)
    expected = merged_weights(base, values_of(model), 2)
    wanted = expected_logits(base, expected)
    before = {n: p.clone() for n, p in model.named_parameters()}
    held = {n: id(p) for n, p in model.named_parameters()}
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert relative_error(logits(model), wanted) < MODEL64
        model.unmerge_adapter()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert {n: id(p) for n, p in model.named_parameters()} == held
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert not any("lora" in n for n, _ in merged.named_modules())
    weights = dict(model.merge_and_unload().named_parameters())
    assert weights.keys() == dict(base.named_parameters()).keys()
    for n, weight in expected.items():
        assert relative_error(weights[n], weight) < FLOAT64
        assert torch.equal(weights[n], dict(merged.named_parameters())[n])


def test_a_merge_leaves_what_shares_the_memory_alone():
    base = mixture("mixtral")
    first, second = (base.get_submodule(f"model.layers.{n}.mlp.experts") for n in (0, 2))
    second.down_proj = first.down_proj
    before = first.down_proj.detach().clone()
    model = adapted_mixture(copy.deepcopy(base), target_parameters=["layers.0.mlp.experts.down_proj"])
    merged = model.merge_and_unload()
    own, shared = (merged.get_submodule(f"model.layers.{n}.mlp.experts").down_proj for n in (0, 2))
    assert torch.equal(shared, before)
    assert not torch.equal(own, before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 1e6])
def test_a_merge_that_would_break_a_weight_is_refused_before_anything_is_changed(broken):
    model = adapted_mixture(mixture("gpt_oss", torch.float16))
    layer = model.get_base_model().get_submodule("model.layers.2.mlp.experts.base_layer")
    layer.lora_B["default"].weight.data[0, 0] = broken
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"NaN or inf (.*gate_up_proj|in float16)"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, before[n]) or p.isnan().any() for n, p in model.named_parameters())


@pytest.mark.quick(name=["gpt_oss"])
@EVERY_MIXTURE
def test_a_saved_adapter_computes_what_it_did(name, tmp_path):
    base = mixture(name)
    model = adapted_mixture(copy.deepcopy(base), pre_num=2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith("lora_magnitude_vector") for key in saved) == 16  # a stamp for each layer
    assert relative_error(logits(loaded), expected) < 1e-6  # saved in float32
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(logits(again), expected)


def test_stamps_tell_the_parameters_of_one_module_apart(tmp_path):
    """Of two parameters with one shape, only the nesting of their layers in the file says which is which."""
    base = nn.Sequential(*(Two() for _ in range(2)))
    config = ResLoRAConfig(target_modules=[], target_parameters=["first", "second"], r=2)
    randomized(get_peft_model(base, config)).save_pretrained(tmp_path)
    turned = nn.Sequential(*(Turned() for _ in range(2)))
    with pytest.raises(ValueError, match=r"another computation than this one .*first of 3 experts"):
        PeftModel.from_pretrained(turned, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v * 1.01 if k.endswith("1.lora_A.weight") else v for k, v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"damaged|lora_A is not what was saved"):
        PeftModel.from_pretrained(nn.Sequential(*(Two() for _ in range(2))), tmp_path)


class Two(nn.Module):
    """Two parameters of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 5, 5))
        self.second = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi,eno->bn", x, self.first, self.second)


class Turned(Two):
    """The same in the other order."""

    def __init__(self) -> None:
        super().__init__()
        first = self.first
        del self.first
        self.first = first


def test_adapters_can_be_turned_off_and_added_up():
    base = mixture("qwen3_moe")
    model = adapted_mixture(copy.deepcopy(base))
    config = ResLoRAConfig(**{**vars_of(model), "r": 3, "pre_num": 2})
    model.add_adapter("other", config)
    randomized(model, "other", seed=2)
    one = merged_weights(base, values_of(model), 1)
    two = merged_weights(base, {n: 2 / 3 * v if "lora_B" in n else v for n, v in scaled(model).items()}, 2)
    assert relative_error(logits(model), expected_logits(base, one)) < MODEL64
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    model.set_adapter("other")
    assert relative_error(logits(model), expected_logits(base, two)) < MODEL64
    model.base_model.set_adapter(["default", "other"])
    plain = dict(base.named_parameters())
    both = {n: one[n] + two[n] - plain[n].detach() for n in one}
    assert relative_error(logits(model), expected_logits(base, both)) < MODEL64
    model.merge_adapter()
    assert relative_error(logits(model), expected_logits(base, both)) < MODEL64
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert relative_error(logits(model), expected_logits(base, two)) < MODEL64


def vars_of(model: PeftModel) -> dict[str, Any]:
    config = model.peft_config["default"]
    return {name: getattr(config, name) for name in ("target_modules", "target_parameters", "lora_alpha")}


def scaled(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: value.detach() * 1.5 if "lora_B" in name else value.detach()
        for name, value in values_of(model, "other").items()
    }


def test_a_base_in_half_precision_has_the_sum_rounded_once():
    base = mixture("mixtral", torch.bfloat16)
    model = adapted_mixture(copy.deepcopy(base))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    wide = copy.deepcopy(base).double()
    expected = merged_weights(wide, values_of(model), 1)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, weight in expected.items():
        assert relative_error(merged[name], weight) < half_rounding(1, torch.bfloat16)
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.experts")
    with layer._activate_lora(["default"]):  # factors are rounded too, as PEFT does it
        running = layer.get_base_layer().down_proj.detach()
    assert relative_error(running, expected["model.layers.1.mlp.experts.down_proj"]) < half_rounding(3, torch.bfloat16)
    logits(model).float().square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


class Router(nn.Module):
    """A parameter with two dimensions, as routers have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(nn.functional.linear(x, self.weight))


class OneExpert(nn.Module):
    """A mixture of one expert, transposed and not square."""

    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(1, 7, 4))
        self.down = nn.Parameter(torch.randn(1, 4, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.up[0]) @ self.down[0]


@pytest.mark.parametrize(("kind", "names"), [(Router, ["weight"]), (OneExpert, ["up", "down"])])
def test_matrices_and_single_experts_are_right(kind, names):
    torch.manual_seed(0)
    base = nn.Sequential(*(kind() for _ in range(3))).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    fields = {"target_modules": [], "target_parameters": [f"{n}.{name}" for n in range(3) for name in names]}
    model = randomized(get_peft_model(copy.deepcopy(base), ResLoRAConfig(r=2, lora_alpha=3, pre_num=2, **fields)))
    values = values_of(model)
    nesting = {names[-1]: "", names[0]: ".base_layer"} if len(names) > 1 else {"weight": ""}
    expected = torch.func.functional_call(base, merged_weights(base, values, 2, nesting=nesting), x)
    actual = model(x)
    assert relative_error(actual, expected) < FLOAT64
    assert_gradients_close(gradients_of(actual, model, values), gradients_of(expected, None, values))
    assert relative_error(model.merge_and_unload()(x), expected) < FLOAT64


class Odd(nn.Module):
    """Parameters that cannot be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.codes = nn.Parameter(torch.zeros(3, 5, 5, dtype=torch.uint8), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(3, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight) * self.scale


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"target_parameters": ["0.scale"]}, r"'0\.scale' of Odd, which has 1 dimensions"),
        ({"target_parameters": ["0.codes"]}, r"'0\.codes' of Odd, which is torch\.uint8 and no plain numbers"),
        ({"target_parameters": ["0.wieght"]}, r"No `target_modules` passed but also no `target_parameters` found"),
        ({"target_parameters": ["1.weight"]}, r"'1\.weight' of ParametrizedOdd, which is computed from other tensors"),
        ({"target_parameters": ["whole"]}, r"'\.whole' of Sequential, which the whole model itself holds"),
        ({"target_parameters": ["0.weight"], "r": 5000}, r"rank 5000 is more than 1024"),
        ({"target_parameters": ["2.weight"], "target_modules": ["2"]}, r"not a valid target.*also targeted"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused(targets, message):
    base = nn.Sequential(Odd(), Odd(), nn.Linear(5, 5))
    base.whole = nn.Parameter(torch.randn(3, 5, 5))
    nn.utils.parametrize.register_parametrization(base[1], "weight", nn.Identity())
    refuse(base, message, lambda: get_peft_model(base, ResLoRAConfig(**{"target_modules": [], **targets})))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shortcut": "input"}, "choose shortcut='block'"),
        ({"shortcut": "middle", "pre_num": 2}, "choose shortcut='block'"),
        ({"use_dora": True}, "use_dora=True, whose norms"),
        ({"total_step": 9}, "AdaLoRA"),
        ({"nested_ranks": True}, "nested_ranks=True, whose directions"),
        ({"lora_dropout": 0.1}, "set lora_dropout=0"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"lora_bias": True}, "lora_bias=True changes"),
        ({"init_lora_weights": "orthogonal"}, "choose True or 'gaussian'"),
        ({"layers_to_transform": [0]}, "name the parameters of these layers in full"),
        ({"target_parameters": "experts.down_proj"}, "target_parameters='experts.down_proj' must be a list"),
    ],
)
def test_configs_that_mean_nothing_for_parameters_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ResLoRAConfig(**{"target_modules": [], "target_parameters": ["experts.down_proj"], **fields})


def test_another_adapter_has_to_target_the_same_parameters():
    model = adapted_mixture(mixture("mixtral"))
    other = ResLoRAConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    refuse(model, "all adapters must target the same set of parameters", lambda: model.add_adapter("other", other))
    model = get_peft_model(nn.Sequential(Odd(), Odd()), ResLoRAConfig(target_modules=[], target_parameters=["weight"]))
    other = ResLoRAConfig(target_modules=[], target_parameters=["weight"])
    refuse(model, "which belongs to another adapter", lambda: model.add_adapter("other", other))


def test_what_is_computed_or_elsewhere_at_the_call_is_refused():
    model = adapted_mixture(mixture("mixtral"))
    experts = model.get_base_model().get_submodule("model.layers.1.mlp.experts").get_base_layer()
    held = experts.down_proj
    experts.down_proj = nn.Parameter(held.to("meta"))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts\.down_proj'.* is sharded or offloaded"):
        logits(model)
    experts.down_proj = held
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.raises(RuntimeError, match="computed from other tensors"):
        logits(model)
    with pytest.raises(ValueError, match=r"experts\.down_proj', whose weight is computed anew"):
        model.merge_adapter()


def test_offloaded_parameters_are_refused_in_calls_and_merges():
    """Hooks that only move inputs, as on several devices, are right."""
    model = adapted_mixture(mixture("mixtral", torch.float32))
    expected = logits(model)
    placed = copy.deepcopy(model)
    dispatch_model(placed.get_base_model(), {"": "cpu"}, force_hooks=True)
    assert relative_error(logits(placed), expected) < rounding(model)
    cpu_offload(model.get_base_model())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.experts\..* is sharded or offloaded"):
        logits(model)
    with pytest.raises(ValueError, match=r"experts\.\w+_proj', a parameter that is offloaded"):
        model.merge_and_unload()


def test_a_scale_holds_in_calls_and_merges():
    model = adapted_mixture(mixture("gpt_oss"))
    before = logits(model)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(0.5)
    scaled_logits = logits(model)
    assert relative_error(scaled_logits, before) > 0.1
    assert relative_error(logits(model.merge_and_unload()), scaled_logits) < MODEL64


def test_other_ways_to_load_and_to_run(tmp_path):
    base = mixture("qwen3_moe", torch.float32)
    model = adapted_mixture(copy.deepcopy(base)).eval()
    expected = logits(model).detach()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert relative_error(logits(model), expected) < rounding(model)
    assert torch.equal(
        logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)), expected
    )
    by_transformers = copy.deepcopy(base)
    by_transformers.load_adapter(tmp_path)
    assert torch.equal(logits(by_transformers.eval()), expected)
    assert torch.equal(logits(model.unload()), logits(base.eval()))


def test_what_needs_one_product_is_refused():
    model = adapted_mixture(mixture("mixtral", torch.float32))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="ParamWrapper, whose merge is not known"):
        merge_and_restart(model, optimizer)
    with pytest.raises(ValueError, match=r"experts' adapts a parameter.*target_modules"):
        LayerGates(model)
    with pytest.raises(ValueError, match="each expert"):
        factor_pairs(model)
    with pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="linear")
    before = logits(model.eval())
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        model(input_ids=tokens(), adapter_names=["default"] * 3)
    assert torch.equal(logits(model), before)


def test_merge_reports_are_exact():
    model = adapted_mixture(mixture("mixtral", torch.float32)).eval()
    report = merge_report(model, [{"input_ids": tokens()}])
    assert report.exact
    assert report.costs["exact"].kl < 1e-6


def test_the_default_experts_of_transformers_compute_the_same():
    base = mixture("qwen3_moe", torch.float32)
    model = adapted_mixture(copy.deepcopy(base))
    eager = logits(model)
    for implementation in ("batched_mm", "grouped_mm"):
        model.get_base_model().set_experts_implementation(implementation)
        assert relative_error(logits(model), eager) < 1e-4


def test_all_experts_that_are_asked_for_leave_nothing_to_say(recwarn):
    base = mixture("qwen3_moe")
    get_peft_model(
        base,
        ResLoRAConfig(target_modules="all-linear", target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    )
    assert not [w for w in recwarn if "Left out" in str(w.message)]


def test_a_chain_of_one_is_plain_lora():
    base = mixture("gpt_oss")
    fields = {"r": 2, "target_modules": [], "target_parameters": ["layers.1.mlp.experts.down_proj"]}
    with pytest.warns(UserWarning, match="no shortcut at all"):
        model = randomized(get_peft_model(copy.deepcopy(base), ResLoRAConfig(**fields)))
    plain = randomized(get_peft_model(copy.deepcopy(base), LoraConfig(**fields)))
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("first", [LoraConfig, ResLoRAConfig])
def test_adapters_of_peft_and_ours_do_not_share_a_parameter(first):
    """As transformers' `add_adapter` would let them: PEFT's layers know no shortcuts, and ours no other method."""
    second = ResLoRAConfig if first is LoraConfig else LoraConfig
    fields = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    model = mixture("mixtral", torch.float32)
    model.add_adapter(first(**fields), "first")
    randomized(model, "first")
    before = logits(model)
    with pytest.raises(
        ValueError, match=r"experts\.down_proj'.*(PEFT's LoRA adds an adapter already|an adapter of ResLoRA)"
    ):
        model.add_adapter(second(**fields), "second")
    model.set_adapter("first")
    assert torch.equal(logits(model), before)
    assert not any("second" in name for name, _ in model.named_parameters())
