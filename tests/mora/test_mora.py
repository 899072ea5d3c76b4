"""MoRA: the operators against an index-by-index oracle, and every promise a PEFT tuner makes."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import FLOAT64, half_rounding, rounding
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.mora import AUTO_SHARING_FROM_RANK, MoRAConfig, MoRALayer, MoRALinear, MoRAModel, layer_sizes
from peft_reslora.mora.operators import OPERATORS, delta_weight, rotation_table, sharing_factors, square_size
from peft_reslora.registration import add_peft_type, register_tuner

add_peft_type("MORA")
register_tuner("MORA", MoRAConfig, MoRAModel)

TYPES = ("sharing", "decoupling", "rotation")
# (in, out, r): even and uneven divisions, squares larger than the input, the output, twice the input, and both
SHAPES = [(24, 16, 2), (33, 17, 2), (8, 96, 3), (96, 8, 3), (20, 2, 4), (2, 20, 8), (5, 7, 9), (1, 1, 1), (64, 64, 1)]


def reference(x: torch.Tensor, M: torch.Tensor, out_features: int, mora_type: str) -> torch.Tensor:
    """One vector through MoRA, index by index, as the paper says it."""
    q, n = M.shape[0], len(x)
    groups = [torch.stack([x[(g * q + i) % n] for i in range(q)]) for g in range(math.ceil(n / q))]
    if mora_type == "sharing":
        result = M @ sum(groups)
    else:
        if mora_type == "rotation":
            groups = [_rotated(group, g) for g, group in enumerate(groups)]
        result = torch.cat([M @ group for group in groups])
    return torch.stack([result[o % len(result)] for o in range(out_features)])


def _rotated(group: torch.Tensor, position: int) -> torch.Tensor:
    half = len(group) // 2
    turned = [None] * len(group)
    for j in range(half):
        angle = position * 10000 ** (-2 * j / len(group))
        turned[j] = group[j] * math.cos(angle) - group[j + half] * math.sin(angle)
        turned[j + half] = group[j + half] * math.cos(angle) + group[j] * math.sin(angle)
    return torch.stack(turned)


def dense_reference(M: torch.Tensor, in_features: int, out_features: int, mora_type: str) -> torch.Tensor:
    """The delta weight, column by column from basis vectors."""
    basis = torch.eye(in_features, dtype=M.dtype)
    return torch.stack([reference(e, M, out_features, mora_type) for e in basis], dim=1)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def random_square(shape: tuple[int, int, int], mora_type: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    q = square_size(*shape, mora_type)
    return torch.randn(q, q, dtype=dtype)


def config(mora_type: str = "sharing", r: int = 3, **kwargs: Any) -> MoRAConfig:
    kwargs.setdefault("target_modules", ["lin0", "lin1"])
    return MoRAConfig(r=r, mora_type=mora_type, init_weights=False, **kwargs)


class MLP(nn.Module):
    """Uneven shapes, a layer to leave alone, and one Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(33, 17)
        self.lin1 = Conv1D(20, 17)
        self.head = nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


def mlp(dtype: torch.dtype = torch.float32) -> MLP:
    with torch.random.fork_rng():  # the same base each time, and other adapters
        torch.manual_seed(0)
        return MLP().to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 3, 33, generator=torch.Generator().manual_seed(1)).to(dtype)


def base_weights(model: nn.Module) -> list[torch.Tensor]:
    return [m.get_base_layer().weight.detach().clone() for m in model.modules() if isinstance(m, MoRALayer)]


def layer(base: nn.Module, *adapters: tuple[str, MoRAConfig]) -> MoRALinear:
    (name, first), *others = adapters
    result = MoRALinear(base, name, first.r, first)
    for name, other in others:
        result.update_layer(name, other.r, other)
    result.set_adapter([name for name, _ in adapters])
    return result


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class TestOperators:
    @pytest.mark.parametrize("mora_type", TYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_operator_delta_weight_and_gradients_equal_the_oracle(self, shape, mora_type):
        in_features, out_features, _ = shape
        M = random_square(shape, mora_type).requires_grad_()
        x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
        dense = dense_reference(M, in_features, out_features, mora_type)
        expected = x @ dense.T
        actual = OPERATORS[mora_type](x, M, out_features)
        assert relative_error(actual, expected) < FLOAT64
        assert relative_error(delta_weight(M, in_features, out_features, mora_type), dense) < FLOAT64
        upstream = torch.randn_like(expected)
        for ours, theirs in zip(
            torch.autograd.grad(actual, (x, M), upstream), torch.autograd.grad(expected, (x, M), upstream), strict=True
        ):
            assert relative_error(ours, theirs) < FLOAT64

    @pytest.mark.parametrize("shape", SHAPES)
    def test_sharing_factors_multiply_to_the_delta_weight(self, shape):
        M = random_square(shape, "sharing")
        A, B = sharing_factors(M, *shape[:2])
        q = M.shape[0]
        assert A.shape == (q, shape[0])
        assert B.shape == (shape[1], q)
        torch.testing.assert_close(B @ A, dense_reference(M, *shape[:2], "sharing"))

    @pytest.mark.parametrize("mora_type", TYPES)
    @pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096, 8), (4096, 11008, 8), (4096, 1024, 256)])
    def test_square_size_matches_the_parameter_count_of_lora(self, shape, mora_type):
        in_features, out_features, r = shape
        q, root = square_size(*shape, mora_type), math.sqrt((in_features + out_features) * r)
        assert q > 0
        if mora_type == "rotation":
            assert q % 2 == 0
            assert abs(q - root) <= 1
        else:
            assert q == math.floor(root + 0.5)

    def test_sharing_at_rank_256_is_1448_wide(self):
        assert square_size(4096, 4096, 256, "sharing") == 1448
        assert square_size(4096, 4096, 8, "rotation") == 256

    def test_decoupling_with_the_identity_returns_its_input(self):
        x, M = torch.randn(2, 12), torch.eye(4)
        torch.testing.assert_close(OPERATORS["decoupling"](x, M, 12), x)

    def test_rotation_table_is_built_once_per_size_and_usable_after_inference_mode(self):
        with torch.inference_mode():
            cos, sin = rotation_table(6, 5, torch.device("cpu"), torch.float32)
        assert not cos.is_inference()
        assert not sin.is_inference()
        assert rotation_table(6, 5, torch.device("cpu"), torch.float32)[0] is cos
        assert rotation_table(6, 5, torch.device("cpu"), torch.float64)[0].dtype == torch.float64
        assert rotation_table(6, 5, torch.device("meta"), torch.float32)[0].is_meta


class TestConfig:
    def test_all_faults_are_reported_at_once(self):
        with pytest.raises(ValueError, match="cannot be used") as info:
            MoRAConfig(
                r=0,
                mora_type="rope",
                mora_dropout=1.0,
                bias="lora_only",
                init_weights="gaussian",
                rank_pattern={"q_proj": -1},
                target_modules=".*q_proj",
                layers_to_transform=[0],
            )
        for part in ("r=0", "'rope'", "'rotation'", "mora_dropout=1.0", "'lora_only'", "'mora_only'", "'gaussian'"):
            assert part in str(info.value)
        assert "rank_pattern['q_proj']=-1" in str(info.value)
        assert "layers_to_transform" in str(info.value)

    @pytest.mark.parametrize("r", [True, 2.0, "8", None, -3])
    def test_rank_must_be_a_positive_integer(self, r):
        with pytest.raises(ValueError, match="must be a positive integer"):
            MoRAConfig(r=r)

    def test_config_survives_saving(self, tmp_path):
        MoRAConfig(r=5, target_modules=["q_proj"], rank_pattern={"q_proj": 7}).save_pretrained(tmp_path)
        loaded = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(loaded, MoRAConfig)
        assert (loaded.r, loaded.mora_type, loaded.rank_pattern) == (5, "auto", {"q_proj": 7})
        assert loaded.target_modules == {"q_proj"}

    def test_auto_is_rotation_for_small_ranks_and_sharing_for_large_ones(self):
        model = get_peft_model(
            mlp(), config("auto", r=8, rank_pattern={"lin1": AUTO_SHARING_FROM_RANK}, target_modules=["lin0", "lin1"])
        )
        sizes = {size.name.rpartition(".")[2]: size for size in layer_sizes(model)}
        assert sizes["lin0"].mora_type == "rotation"
        assert sizes["lin1"].mora_type == "sharing"
        assert (sizes["lin0"].r, sizes["lin1"].r) == (8, AUTO_SHARING_FROM_RANK)
        assert model.peft_config["default"].r == 8
        assert sizes["lin0"].lora_parameters == 8 * (33 + 17)
        assert sizes["lin0"].parameters == sizes["lin0"].square_size ** 2 == 400

    def test_default_targets_are_those_of_lora(self):
        model = TINY_MODELS["llama"].make()
        get_peft_model(model, MoRAConfig())
        assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, MoRALayer)} == {
            "q_proj",
            "v_proj",
        }


class TestLayer:
    @pytest.mark.parametrize("conv1d", [False, True])
    @pytest.mark.parametrize("mora_type", TYPES)
    @pytest.mark.parametrize("shape", [(33, 17, 2), (8, 96, 3), (20, 2, 4), (2, 20, 8), (5, 7, 9)])
    def test_output_and_gradients_equal_the_dense_formula(self, shape, mora_type, conv1d):
        in_features, out_features, r = shape
        base = Conv1D(out_features, in_features) if conv1d else nn.Linear(in_features, out_features)
        mora = layer(base, ("default", config(mora_type, r)))
        x = torch.randn(2, 5, in_features, requires_grad=True)
        M = mora.mora_M["default"]
        bound = rounding(10 * (in_features + out_features))  # a gradient sums over 10 rows, too

        x64, M64 = (t.detach().double().requires_grad_() for t in (x, M))
        weight = base.weight.detach().double()
        weight = weight.T if conv1d else weight
        dense = dense_reference(M64, in_features, out_features, mora_type)
        expected = x64 @ (weight + dense).T + base.bias.detach().double()
        upstream = torch.randn(2, 5, out_features)
        expected.backward(upstream.double())
        actual = mora(x)
        actual.backward(upstream)
        assert relative_error(actual, expected) < bound
        assert relative_error(M.grad, M64.grad) < bound
        assert relative_error(x.grad, x64.grad) < bound
        delta = mora.get_delta_weight("default")
        assert delta.shape == base.weight.shape
        assert relative_error(delta.T if conv1d else delta, dense) < bound

    def test_two_adapters_of_different_rank_and_type_add_up(self):
        mora = layer(
            nn.Linear(33, 17),
            ("a", config("sharing", 2)),
            ("b", config("rotation", 5)),
            ("c", config("decoupling", 3)),
        )
        x = torch.randn(4, 33)
        expected = mora.base_layer(x) + sum(x @ mora.get_delta_weight(name).T for name in ("a", "b", "c"))
        torch.testing.assert_close(mora(x), expected)
        assert {mora.square_size[n] for n in "abc"} == {10, 16, 12}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cast_adapter", [True, False])
    @pytest.mark.parametrize("mora_type", TYPES)
    def test_half_precision_equals_the_delta_weight_up_to_rounding(self, mora_type, cast_adapter, dtype):
        model = get_peft_model(mlp(dtype), config(mora_type), autocast_adapter_dtype=cast_adapter)
        mora = model.base_model.model.lin0
        assert mora.mora_M["default"].dtype == (torch.float32 if cast_adapter else dtype)
        x = inputs(dtype)
        result = mora(x)
        weight = mora.base_layer.weight.double() + mora.get_delta_weight("default").double()
        expected = x.double() @ weight.T + mora.base_layer.bias.double()
        assert result.dtype == dtype
        assert relative_error(result, expected) < 2 * torch.finfo(dtype).eps
        result.sum().backward()
        assert torch.isfinite(mora.mora_M["default"].grad).all()

    @pytest.mark.parametrize("mora_type", TYPES)
    def test_autocast_equals_full_precision_up_to_rounding(self, mora_type):
        model = get_peft_model(mlp(), config(mora_type))
        expected = model(inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(inputs())
        actual.float().sum().backward()
        assert relative_error(actual, expected) < half_rounding(12, torch.bfloat16)
        assert model.base_model.model.lin0.mora_M["default"].grad.dtype == torch.float32

    def test_input_dtype_casting_can_be_disabled(self):
        model = get_peft_model(mlp(), config())
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            model.base_model.model.lin0(inputs().double())

    def test_dropout_acts_on_the_update_only_and_only_in_training(self):
        mora = layer(nn.Linear(33, 17), ("default", config(mora_dropout=0.5)))
        x = torch.randn(4, 33)
        assert not torch.equal(mora(x), mora(x))
        mora.eval()
        assert torch.equal(mora(x), mora(x))
        mora.train()
        mora.mora_M["default"].data.zero_()
        assert torch.equal(mora(x), mora.base_layer(x))

    def test_merged_factors_are_exact_for_sharing_and_in_linear_orientation(self):
        for base in (nn.Linear(33, 17), Conv1D(17, 33)):
            mora = layer(base, ("default", config("sharing", 4)))
            A, B = mora.merged_factors("default")
            delta = mora.get_delta_weight("default")
            torch.testing.assert_close(B @ A, delta.T if isinstance(base, Conv1D) else delta)
            assert A.shape == (mora.square_size["default"], 33)

    @pytest.mark.parametrize("mora_type", ["decoupling", "rotation"])
    def test_merged_factors_of_full_rank_updates_are_refused(self, mora_type):
        mora = layer(nn.Linear(33, 17), ("default", config(mora_type)))
        with pytest.raises(
            ValueError, match=rf"'default' has mora_type='{mora_type}'.*full rank.*rank=.*energy=.*merge_and_unload"
        ):
            mora.merged_factors("default")

    def test_unknown_adapter_is_named(self):
        mora = layer(nn.Linear(33, 17), ("default", config()))
        with pytest.raises(ValueError, match="'other' is not on layer without a name; it has 'default'"):
            mora.get_delta_weight("other")

    @pytest.mark.parametrize("mora_type", TYPES)
    def test_compiles_without_graph_breaks(self, mora_type):
        mora = layer(nn.Linear(33, 17), ("default", config(mora_type)))
        compiled = torch.compile(mora, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 33)
        actual = compiled(x)
        torch.testing.assert_close(actual, mora(x))
        actual.sum().backward()
        compiled_grad, mora.mora_M["default"].grad = mora.mora_M["default"].grad, None
        mora(x).sum().backward()
        torch.testing.assert_close(compiled_grad, mora.mora_M["default"].grad)


class TestModel:
    @pytest.mark.parametrize("mora_type", TYPES)
    def test_fresh_adapter_changes_nothing_and_trains_its_squares_only(self, mora_type):
        base = mlp()
        expected = base(inputs())
        model = get_peft_model(base, MoRAConfig(r=3, mora_type=mora_type, target_modules=["lin0", "lin1"]))
        assert torch.equal(model(inputs()), expected)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            "base_model.model.lin0.mora_M.default",
            "base_model.model.lin1.mora_M.default",
        }
        model(inputs()).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
    def test_every_architecture_merges_to_the_same_output(self, family):
        tiny = TINY_MODELS[family]
        batch = tiny.inputs()
        model = get_peft_model(tiny.make(), config("auto", r=2, target_modules=tiny.targets))
        with torch.no_grad():
            expected = output_of(model, batch)
            merged = model.merge_and_unload(safe_merge=True)
            assert relative_error(output_of(merged, batch), expected) < rounding(merged)
        assert not any(isinstance(m, MoRALayer) for m in merged.modules())

    @pytest.mark.parametrize("mora_type", TYPES)
    def test_save_and_load(self, tmp_path, mora_type):
        model = get_peft_model(mlp(), config(mora_type, modules_to_save=["head"]))
        model.base_model.model.head.modules_to_save["default"].weight.data.add_(1)
        expected = model(inputs())
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "adapter_model.safetensors")
        assert set(saved) == {
            *(f"base_model.model.lin{i}.mora_{part}" for i in (0, 1) for part in ("M", "stamp")),
            "base_model.model.head.weight",
            "base_model.model.head.bias",
        }
        for low_cpu_mem_usage in (False, True):
            loaded = PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            torch.testing.assert_close(loaded(inputs()), expected)
        other = get_peft_model(mlp(), config("decoupling", r=7))
        other.load_adapter(tmp_path, "second")
        other.set_adapter("second")
        torch.testing.assert_close(other(inputs()), expected)

    def test_bias_of_the_adapted_layers_is_trained_and_saved(self):
        model = get_peft_model(mlp(), config(bias="mora_only"))
        assert model.base_model.model.lin0.base_layer.bias.requires_grad
        assert not model.base_model.model.head.bias.requires_grad
        assert "base_model.model.lin0.base_layer.bias" in get_peft_model_state_dict(model)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("base_model.model.lin1.mora_M"), r"'default' on this model: 1 missing: lin1\.mora_M"),
            (
                lambda s: s.update({"base_model.model.lin9.mora_M": torch.zeros(2, 2)}),
                r"1 not in the model: lin9\.mora_M",
            ),
            (
                lambda s: s.update({"base_model.model.lin0.mora_M": torch.zeros(3, 3)}),
                r"lin0\.mora_M has shape \(3, 3\) instead of \(12, 12\), that of r=3",
            ),
        ],
    )
    def test_checkpoint_that_does_not_fit_is_refused(self, tmp_path, change: Callable[[dict], Any], message):
        get_peft_model(mlp(), config("rotation")).save_pretrained(tmp_path)
        state = load_file(tmp_path / "adapter_model.safetensors")
        change(state)
        save_file(state, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(mlp(), tmp_path)

    def test_injected_model_saves_and_loads_without_prefix(self):
        source = inject_adapter_in_model(config("rotation"), mlp())
        state = get_peft_model_state_dict(source)
        assert set(state) == {f"lin{n}.mora_{part}" for n in (0, 1) for part in ("M", "stamp")}
        target = inject_adapter_in_model(config("rotation"), mlp())
        assert not torch.equal(target(inputs()), source(inputs()))
        set_peft_model_state_dict(target, state)
        assert torch.equal(target(inputs()), source(inputs()))
        prefixed = {f"base_model.model.{key}": value for key, value in state.items()}
        set_peft_model_state_dict(target, prefixed)
        by_keys = inject_adapter_in_model(config("rotation", target_modules=["lin0"]), mlp(), state_dict=state)
        assert isinstance(by_keys.lin1, MoRALayer)

    def test_adapters_can_be_added_set_disabled_and_deleted(self):
        base = mlp()
        plain = base(inputs())
        model = get_peft_model(base, config("sharing"))
        first = model(inputs())
        model.add_adapter("other", config("rotation", r=2, target_modules=["lin1"]))
        assert torch.equal(model(inputs()), first)
        assert not model.base_model.model.lin1.mora_M["other"].requires_grad
        model.set_adapter("other")
        second = model(inputs())
        assert not torch.equal(second, first)
        assert model.base_model.model.lin1.mora_M["other"].requires_grad
        model.base_model.set_adapter(["default", "other"])
        mora = model.base_model.model.lin1
        x = torch.randn(2, 17)
        torch.testing.assert_close(
            mora(x), mora.base_layer(x) + x @ mora.get_delta_weight("default") + x @ mora.get_delta_weight("other")
        )
        with model.disable_adapter():
            assert torch.equal(model(inputs()), plain)
        model.delete_adapter("default")
        assert set(mora.mora_M) == set(mora.r) == set(mora.mora_type) == set(mora.square_size) == {"other"}
        assert set(mora.mora_dropout) == {"other"}
        model.set_adapter("other")
        torch.testing.assert_close(model(inputs()), second)
        assert torch.equal(model.unload()(inputs()), plain)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("mora_type", ["sharing", "rotation"])
    def test_gradient_checkpointing_changes_no_gradient(self, mora_type, use_reentrant):
        tiny = TINY_MODELS["llama"]
        batch = tiny.inputs()
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(3)
            model = get_peft_model(tiny.make(), config(mora_type, target_modules=tiny.targets)).train()
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            output_of(model, batch).square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert len(gradients[0]) == 28
        torch.testing.assert_close(gradients[0], gradients[1])

    @pytest.mark.parametrize(
        ("extra", "name"),
        [
            (nn.Embedding(4, 33), "extra"),
            (nn.Conv1d(3, 3, 1), "extra"),
            (nn.MultiheadAttention(8, 2), "extra"),
            (nn.MultiheadAttention(8, 2), "extra.out_proj"),
            (nn.TransformerEncoderLayer(8, 2), "extra.linear1"),
        ],
    )
    def test_layers_that_are_not_linear_are_refused_by_name_before_any_change(self, extra, name):
        base = mlp()
        base.extra = extra
        with pytest.raises(ValueError, match=rf"{name} \(\w+\), which is .*exclude_modules"):
            get_peft_model(base, config(target_modules=["lin0", name]))
        assert isinstance(base.lin0, nn.Linear)
        with pytest.raises(ValueError, match=f"cannot adapt {name} "):
            inject_adapter_in_model(config(), base, state_dict={f"{name}.mora_M": torch.zeros(2, 2)})

    def test_torchao_base_without_its_config_is_refused_before_any_change(self):
        base = _torchao_mlp()
        del base.hf_quantizer
        base.lin1 = nn.Linear(4, 4)
        with pytest.raises(ValueError, match="'get_apply_tensor_subclass' was not provided"):
            get_peft_model(base, config(target_modules=["lin1", "lin0"]))
        assert isinstance(base.lin1, nn.Linear)

    def test_layer_with_another_methods_adapter_is_refused(self):
        base = inject_adapter_in_model(LoraConfig(target_modules=["lin0"]), mlp(), "lora")
        with pytest.raises(ValueError, match=r"lin0 .* already carries an adapter of another method"):
            inject_adapter_in_model(config(), base, "mora")

    def test_mixed_batches_are_refused(self):
        model = get_peft_model(mlp(), config()).eval()
        with pytest.raises(ValueError, match=r"MoRA does not support `adapter_names`.*set_adapter"):
            model(inputs(), adapter_names=["default"] * 4)

    @pytest.mark.parametrize("mora_type", TYPES)
    def test_pefts_own_lora_conversion_is_right(self, mora_type):
        model = get_peft_model(mlp(), config(mora_type)).eval()
        assert model.supports_lora_conversion()
        lora_config, state = convert_to_lora(model, rank=17)
        lora = get_peft_model(mlp(), lora_config).eval()
        set_peft_model_state_dict(lora, state)
        assert relative_error(lora(inputs()), model(inputs())) < rounding(lora)

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: _pickled(m)])
    def test_copies_compute_the_same(self, copier):
        model = get_peft_model(mlp(), config("rotation"))
        assert torch.equal(copier(model)(inputs()), model(inputs()))


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_unmerging_restores_the_bits_after_many_cycles_and_two_adapters(self, dtype):
        model = get_peft_model(mlp(dtype), config("sharing"))
        model.add_adapter("other", config("rotation", r=5))
        before = base_weights(model)
        for names in (["default"], ["default", "other"], None, ["other"]) * 3:
            model.merge_adapter(adapter_names=names)
            assert not torch.equal(base_weights(model)[0], before[0])
            model.unmerge_adapter()
            for ours, theirs in zip(base_weights(model), before, strict=True):
                assert torch.equal(ours, theirs)

    def test_merging_one_after_another_adds_both(self):
        model = get_peft_model(mlp(), config("sharing"))
        model.add_adapter("other", config("rotation", r=5))
        before = base_weights(model)
        model.merge_adapter(["default"])
        with pytest.warns(UserWarning, match="additionally merging other"):
            model.merge_adapter(["other"])
        for mora, weight in zip((model.base_model.model.lin0, model.base_model.model.lin1), before, strict=True):
            expected = weight + mora.get_delta_weight("default") + mora.get_delta_weight("other")
            torch.testing.assert_close(mora.base_layer.weight.detach(), expected)
        model.unmerge_adapter()
        for ours, theirs in zip(base_weights(model), before, strict=True):
            assert torch.equal(ours, theirs)

    def test_half_precision_merge_rounds_once(self):
        model = get_peft_model(mlp(torch.bfloat16), config("rotation"))
        mora = model.base_model.model.lin0
        exact = mora.base_layer.weight.float() + mora.get_delta_weight("default")
        model.merge_adapter()
        assert torch.equal(mora.base_layer.weight.detach(), exact.bfloat16())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_safe_merge_refuses_broken_adapters_with_pefts_message(self, value):
        model = get_peft_model(mlp(), config())
        before = base_weights(model)
        model.base_model.model.lin1.mora_M["default"].data[0, 0] = (
            value  # the last layer: nothing may be merged before
        )
        message = r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"
        with pytest.raises(ValueError, match=message):
            model.merge_adapter(safe_merge=True)
        with pytest.raises(ValueError, match=message):
            model.merge_and_unload(safe_merge=True)
        assert len(base_weights(model)) == 2
        for ours, theirs in zip(base_weights(model), before, strict=True):
            assert torch.equal(ours, theirs)

    def test_safe_merge_refuses_overflow_of_the_base_dtype(self):
        model = get_peft_model(mlp(torch.float16), config())
        model.base_model.model.lin0.mora_M["default"].data.fill_(1e5)
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            model.merge_adapter(safe_merge=True)

    @pytest.mark.parametrize("copier", [lambda m: m, copy.deepcopy, _pickled])
    def test_original_weight_follows_casts_and_copies_and_stays_out_of_checkpoints(self, copier):
        model = get_peft_model(mlp(), config("rotation"))
        before = base_weights(model)
        keys = set(model.state_dict())
        model.merge_adapter()
        assert set(model.state_dict()) == keys
        saved = {f"base_model.model.lin{i}.mora_{part}" for i in (0, 1) for part in ("M", "stamp")}
        assert set(get_peft_model_state_dict(model)) == saved
        moved = copier(model).to(torch.bfloat16)
        moved.unmerge_adapter()
        for ours, theirs in zip(base_weights(moved), before, strict=True):
            assert torch.equal(ours, theirs.bfloat16())

    def test_disabling_or_deleting_a_merged_adapter_restores_the_base(self):
        base = mlp()
        plain = base(inputs())
        model = get_peft_model(base, config())
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(inputs()), plain)
        model.merge_adapter()
        with pytest.raises(ValueError, match="while they are merged"):
            model.delete_adapter("default")
        mora = model.base_model.model.lin0
        with pytest.warns(UserWarning, match="'default' is merged into layer lin0"):
            mora.delete_adapter("default")
        assert not mora.merged
        assert not mora._unmerged

    def test_merge_and_unload_of_named_adapters(self):
        model = get_peft_model(mlp(), config("sharing")).eval()
        model.add_adapter("other", config("rotation", r=5))
        model.set_adapter("other")
        expected = model(inputs())
        model.set_adapter("default")
        merged = model.merge_and_unload(adapter_names=["other"])
        assert isinstance(merged, MLP)
        assert relative_error(merged(inputs()), expected) < rounding(merged)
        assert set(merged.state_dict()) == set(mlp().state_dict())

    def test_weight_that_is_no_plain_number_is_refused(self):
        model = get_peft_model(mlp(), config())
        mora = model.base_model.model.lin0
        mora.base_layer.weight = nn.Parameter(mora.base_layer.weight.detach().to(torch.float8_e4m3fn))
        with pytest.raises(TypeError, match=r"layer lin0 has type torch\.float8_e4m3fn, which PEFT cannot dequantise"):
            model.merge_adapter()


def _bitsandbytes_mlp(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    model = mlp()
    linear: Any = (
        bnb.nn.Linear4bit(64, 96, compute_dtype=torch.float32, quant_type="nf4")
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    )
    linear.load_state_dict(nn.Linear(64, 96).state_dict())
    model = nn.Sequential()
    model.lin0 = linear
    return model.to("cpu")


def _torchao_mlp() -> nn.Module:
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = nn.Sequential()
    model.lin0 = nn.Linear(64, 96)
    torchao.quantize_(model, Int8WeightOnlyConfig())
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    )
    return model


def quantised_weight(mora: MoRALinear) -> list[torch.Tensor]:
    """The stored numbers, packed values and scales, not the weight they stand for."""
    weight = mora.get_base_layer().weight
    if hasattr(weight, "quant_state"):
        return [weight.data.clone(), weight.quant_state.absmax.clone()]
    if hasattr(weight, "SCB"):
        state = mora.get_base_layer().state
        return [weight.data.clone(), (weight.SCB if state.SCB is None else state.SCB).clone()]
    return [weight.qdata.clone(), weight.scale.clone()]


@pytest.mark.parametrize("mora_type", ["sharing", "rotation"])
@pytest.mark.parametrize(
    ("build", "step"),
    [(lambda: _bitsandbytes_mlp(4), 0.15), (lambda: _bitsandbytes_mlp(8), 0.01), (_torchao_mlp, 0.01)],
    ids=["4bit", "8bit", "torchao"],
)
class TestQuantised:
    def test_quantised_base_trains(self, build, step, mora_type):
        model = get_peft_model(build(), MoRAConfig(r=4, mora_type=mora_type, target_modules=["lin0"]))
        mora = model.base_model.model.lin0
        x = torch.randn(5, 64)
        base_output = model(x).detach()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(3):
            loss = (model(x) - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[2] < losses[1] < losses[0]
        torch.testing.assert_close(model(x), base_output + x @ mora.get_delta_weight("default").T)

    def test_merge_quantises_the_sum_and_unmerge_restores_the_bits(self, build, step, mora_type):
        # in training mode, as evaluation on a CPU may repack a 4-bit weight
        model = get_peft_model(build(), config(mora_type, r=4, target_modules=["lin0"])).train()
        mora = model.base_model.model.lin0
        mora.mora_M["default"].data.mul_(0.1)
        x = torch.randn(5, 64)
        expected = model(x)
        before = quantised_weight(mora)
        dequantised = mora.get_base_weight().clone().float()
        for cycle in range(3):
            model.merge_adapter(safe_merge=True)
            error = relative_error(mora.get_base_weight(), dequantised + mora.get_delta_weight("default"))
            assert error < step
            assert relative_error(model(x), expected) < step
            if cycle == 1:
                model = copy.deepcopy(model).to("cpu")
                mora = model.base_model.model.lin0
            model.unmerge_adapter()
            for ours, theirs in zip(quantised_weight(mora), before, strict=True):
                assert torch.equal(ours, theirs)
            assert torch.equal(model(x), expected)
        merged = model.merge_and_unload()
        assert relative_error(merged.lin0(x), expected) < step
        assert type(merged.lin0) is type(build().lin0)


def test_four_bit_weight_repacked_by_an_evaluation_is_refused_not_merged_wrongly():
    model = get_peft_model(_bitsandbytes_mlp(4), config(r=4, target_modules=["lin0"])).eval()
    model(torch.randn(5, 64))
    if not getattr(model.base_model.model.lin0.base_layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks 4-bit weights only on CPUs with AVX512-BF16")
    with pytest.raises(ValueError, match=r"repacked .* merge before evaluating"):
        model.merge_adapter()
