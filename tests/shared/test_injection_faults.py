"""What may be adapted: layers that cannot be are refused or left out before the model is changed, by both tuners."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, llama, output_of
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaConfig,
    DebertaModel,
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.reformer.modeling_reformer import LSHSelfAttention
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from peft_reslora import MoRAConfig, ResLoRAConfig, describe_chains
from peft_reslora.shared.forwards import weights_read

TUNERS: dict[str, Callable[..., Any]] = {
    "input": lambda **fields: ResLoRAConfig(shortcut="input", **fields),
    "block": lambda **fields: ResLoRAConfig(shortcut="block", **fields),
    "middle": lambda **fields: ResLoRAConfig(shortcut="middle", **fields),
    "mora": lambda **fields: MoRAConfig(**fields),
}
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MOE: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "vocab_size": 50, "num_local_experts": 3}

every_tuner = pytest.mark.parametrize("tuner", TUNERS)
both_tuners = pytest.mark.parametrize("tuner", ["block", "mora"])


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**MOE))


def qwen3_moe() -> nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, num_experts=3, moe_intermediate_size=12))


def llama4() -> nn.Module:
    return Llama4ForCausalLM(Llama4TextConfig(**MOE, intermediate_size_mlp=24, head_dim=8, pad_token_id=0))


def phimoe() -> nn.Module:
    return PhimoeForCausalLM(PhimoeConfig(**MOE))


def siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=8, patch_size=4))


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4))


def switch() -> nn.Module:
    sparse = {"num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 3}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 3, "num_heads": 2}
    return SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**sizes, **sparse, num_experts=2, vocab_size=50, decoder_start_token_id=0)
    )


class Tied(nn.Module):
    """Layers of a user's own, used in every way there is but by calling them."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.helped, self.named = (nn.Linear(8, 8) for _ in range(4))
        self.stack = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.inner = nn.Sequential(nn.Linear(8, 8))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.called(x.to(self.called.weight.dtype)) if isinstance(self.called.weight, torch.Tensor) else x
        x = self.help(x @ self.read.weight.T)
        layer = self.named
        x = F.linear(x, layer.weight, layer.bias)
        for other in self.stack:
            x = F.linear(x, other.weight)
        return F.linear(x, self.inner[0].weight)

    def help(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.helped.weight)

    def reset(self) -> None:
        self.unused.weight.data.zero_()


class Below(Tied):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an injection might change, by identity."""
    state: dict[str, Any] = {
        "modules": {name: (id(module), type(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
        "configs": {name: id(config) for name, config in getattr(model, "peft_config", {}).items()},
        "active": [module.active_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)],
    }
    if hasattr(model, "config"):
        state["config"] = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    return state


def refuse(model: nn.Module, message: str, act: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(kind, match=message):
            act()
    assert state_of(model) == before


def adapted_layers(model: nn.Module) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return [name.removeprefix("base_model.model.") for name in names]


# Layers that are read past their forward


READ: list[tuple[Callable[[], nn.Module], str, str]] = [
    (lambda: nn.TransformerEncoderLayer(8, 2, 12), "linear1", "TransformerEncoderLayer"),
    (lambda: nn.TransformerEncoderLayer(8, 2, 12), "linear2", "TransformerEncoderLayer"),
    (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2), "layers.1.linear2", "TransformerEncoder"),
    (lambda: nn.TransformerDecoderLayer(8, 2, 12), "multihead_attn.out_proj", "MultiheadAttention"),
    (mamba, "backbone.layers.1.mixer.x_proj", "MambaMixer"),
    (mamba, "backbone.layers.0.mixer.dt_proj", "MambaMixer"),
    (mamba, "backbone.layers.0.mixer.out_proj", "MambaMixer"),
    (Tied, "read", "Tied"),
    (Tied, "helped", "Tied"),
    (Tied, "named", "Tied"),
    (Tied, "stack.1", "Tied"),
    (Tied, "inner.0", "Tied"),
    (Below, "helped", "Below"),
]


@both_tuners
@pytest.mark.parametrize(("build", "name", "reader"), READ)
def test_layers_that_are_read_past_their_forward_are_refused_by_name(tuner, build, name, reader):
    model = build()
    config = TUNERS[tuner](r=2, target_modules=[name])
    message = rf"{name} \(\w+\), which is read by {reader}\w* past its forward.*exclude_modules"
    refuse(model, message, lambda: get_peft_model(model, config))
    keys = {f"{name}.{'mora_M' if tuner == 'mora' else 'lora_A.weight'}": torch.zeros(2, 2)}
    fresh = TUNERS[tuner](r=2, target_modules=["called"])
    refuse(model, message, lambda: inject_adapter_in_model(fresh, model, state_dict=keys))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (WavLMAttention, {"q_proj", "k_proj", "v_proj", "out_proj"}),
        (JambaMambaMixer, {"conv1d", "dt_proj"}),
        (LSHSelfAttention, {"query_key", "value"}),
        (Tied, {"read", "helped", "named", "stack.*", "inner.*"}),
    ],
)
def test_the_readers_of_weights_are_found_in_their_source(kind, expected):
    assert weights_read(kind) == expected


@pytest.mark.parametrize(
    ("build", "targets"),
    [
        (Tied, ["called", "unused"]),
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50)), "all-linear"),
        (lambda: FalconForCausalLM(FalconConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)), None),
        (lambda: DebertaModel(DebertaConfig(**SIZES, vocab_size=50)), None),
        (TINY_MODELS["t5"].build, "all-linear"),
        (lambda: nn.TransformerDecoderLayer(8, 2, 12), ["linear1", "linear2"]),
    ],
)
@both_tuners
def test_layers_that_are_called_are_adapted(tuner, build, targets, recwarn):
    model = get_peft_model(build(), TUNERS[tuner](r=2, target_modules=targets))
    assert adapted_layers(model)
    assert not [w for w in recwarn if "leaves out" in str(w.message)]


@both_tuners
def test_bloom_with_slices_reads_its_weights(tuner):
    config = BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50, pretraining_tp=2, slow_but_exact=True)
    model = BloomForCausalLM(config)
    message = r"h\.\*\.mlp\.dense_4h_to_h \(Linear, 2 layers\), which is read by BloomMLP"
    refuse(
        model,
        message,
        lambda: get_peft_model(model, TUNERS[tuner](target_modules=["query_key_value", "dense_4h_to_h"])),
    )


@every_tuner
def test_without_the_fast_path_an_encoder_layer_is_adapted_in_training_and_evaluation(tuner):
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        config = TUNERS[tuner](r=2, target_modules=["linear1", "linear2"])
        model = randomize_adapters(get_peft_model(copy.deepcopy(base), config).double())
        trained, evaluated = model.train()(x), model.eval()(x)
        assert relative_error(evaluated, trained) < 1e-10
        assert relative_error(evaluated, base.eval()(x)) > 1e-3
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@both_tuners
def test_all_linear_leaves_out_what_is_read_past_its_forward(tuner, tmp_path):
    base = siglip()
    with pytest.warns(UserWarning, match=r"leaves out head\.attention\.out_proj .* read by MultiheadAttention past"):
        model = get_peft_model(copy.deepcopy(base), TUNERS[tuner](r=2, target_modules="all-linear"))
    expected = [
        name for name, m in base.named_modules() if isinstance(m, nn.Linear) and "attention.out_proj" not in name
    ]
    assert adapted_layers(model) == expected
    pixels = torch.randn(2, 3, 8, 8)
    model.train()(pixel_values=pixels).pooler_output.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomize_adapters(model).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert adapted_layers(loaded) == expected
    pooled = model(pixel_values=pixels).pooler_output
    assert relative_error(loaded(pixel_values=pixels).pooler_output, pooled) < 1e-6


@both_tuners
def test_all_linear_on_mamba_adapts_what_its_kernels_do_not_read(tuner):
    with pytest.warns(UserWarning, match=r"layers\.\*\.mixer\.x_proj \(Linear, 2 layers\).*dt_proj.*out_proj"):
        model = get_peft_model(mamba(), TUNERS[tuner](r=2, target_modules="all-linear"))
    assert adapted_layers(model) == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]


def test_where_nothing_else_is_left_all_linear_is_refused():
    model = nn.MultiheadAttention(8, 2)
    refuse(model, "cannot adapt out_proj", lambda: get_peft_model(model, ResLoRAConfig(target_modules="all-linear")))


def test_a_layer_whose_name_ends_as_that_of_another_is_not_left_out_in_vain():
    """PEFT would choose `attention.out_proj` by the name `out_proj`."""
    model = nn.ModuleDict({"out_proj": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    refuse(model, r"attention\.out_proj", lambda: get_peft_model(model, ResLoRAConfig(target_modules="all-linear")))
    config = ResLoRAConfig(target_modules="all-linear", exclude_modules=r"attention\.out_proj")
    assert adapted_layers(get_peft_model(model, config)) == ["out_proj"]


def fused(self: Tied, x: torch.Tensor) -> torch.Tensor:
    return F.linear(self.read(x), self.called.weight)


class Processor:
    def __call__(self, attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return attn.out(F.linear(x.to(attn.out.weight.dtype), attn.qkv.weight))


class Processed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.processor = Processor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


def test_reading_a_forward_keeps_no_module_alive():
    model = nn.Sequential(Tied())
    model[0].forward = closure_over(nn.Linear(8, 8))
    found = weakref.ref(model[0].forward.__closure__[0].cell_contents)
    get_peft_model(model, MoRAConfig(r=2, target_modules=["0.called"]))
    del model
    gc.collect()
    assert found() is None


def closure_over(kept: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: kept(x)


@both_tuners
def test_what_diffusers_processors_read_is_left_out(tuner):
    with pytest.warns(UserWarning, match=r"leaves out qkv \(Linear\), which is read by Processed"):
        model = get_peft_model(Processed(), TUNERS[tuner](r=2, target_modules="all-linear"))
    assert adapted_layers(model) == ["out"]


@both_tuners
def test_a_forward_of_the_module_itself_counts(tuner):
    """As the kernels of transformers and others set it; accelerate's hooks keep the class's."""
    model = Tied()
    add_hook_to_module(model, ModelHook())
    assert adapted_layers(get_peft_model(copy.deepcopy(model), TUNERS[tuner](target_modules=["called"]))) == ["called"]
    refuse(model, "read by Tied", lambda: get_peft_model(model, TUNERS[tuner](target_modules=["read"])))
    remove_hook_from_module(model)
    model.forward = fused.__get__(model)
    refuse(model, "read by Tied", lambda: get_peft_model(model, TUNERS[tuner](target_modules=["called"])))
    assert adapted_layers(get_peft_model(model, TUNERS[tuner](target_modules=["read"]))) == ["read"]


def test_an_adapter_that_was_saved_with_such_a_layer_still_loads(monkeypatch, tmp_path):
    """Version 0.1.0 adapted the layer, where the adapter had no effect."""
    monkeypatch.setattr("peft_reslora.shared.targets.reader_of", lambda name, modules: None)
    base = siglip()
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), ResLoRAConfig(r=2, target_modules="all-linear")))
    assert "head.attention.out_proj" in adapted_layers(model)
    model.eval().save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"has no effect on head\.attention\.out_proj"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixel_values=pixels).pooler_output
    assert relative_error(loaded(pixel_values=pixels).pooler_output, expected) < 1e-6
    refuse(base, r"cannot adapt head\.attention", lambda: PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


# Subclasses of nn.Linear with a forward of their own


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Plain(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = input @ self.weight.T
        return output if self.bias is None else output + self.bias


@both_tuners
@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (Scaled(8, 8), "Scaled"),
        (DeepseekV4GroupedLinear(8, 8, 2), "DeepseekV4GroupedLinear"),
        (Scaled(8, 8, device="meta"), "Scaled"),
    ],
)
def test_subclasses_that_compute_something_else_are_refused(tuner, layer, name):
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "other": copy.deepcopy(layer)})
    message = rf"other \({name}\), whose forward is not that of a linear layer.*exclude_modules=r'other'"
    refuse(model, message, lambda: get_peft_model(model, TUNERS[tuner](target_modules=["first", "other"])))


@both_tuners
def test_subclasses_that_compute_the_same_are_adapted(tuner):
    model = nn.Sequential(Plain(8, 6, bias=False), Plain(6, 8))
    assert adapted_layers(get_peft_model(model, TUNERS[tuner](r=2, target_modules=["0", "1"]))) == ["0", "1"]


@both_tuners
@pytest.mark.parametrize(
    ("build", "router"),
    [(llama4, "model.layers.*.feed_forward.router (Llama4Router"), (phimoe, "model.layers.*.mlp.router (PhimoeTopK")],
)
def test_routers_are_left_out_of_all_linear_and_refused_when_named(tuner, build, router):
    model = build()
    refuse(
        model,
        r"router \(\w+, 2 layers\), whose forward",
        lambda: get_peft_model(model, TUNERS[tuner](target_modules=["router"])),
    )
    with pytest.warns(UserWarning, match="leaves out") as found:
        adapted = get_peft_model(model, TUNERS[tuner](r=2, target_modules="all-linear")).train()
    assert any(router in str(w.message) for w in found)
    adapted(input_ids=torch.arange(6).view(2, 3)).logits.square().sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


# Experts


NAMED_EXPERTS: list[tuple[Callable[[], nn.Module], Any]] = [
    (mixtral, ["q_proj", "w1", "w2", "w3"]),
    (mixtral, ["w2"]),
    (mixtral, r".*\.(q_proj|w1|w2|w3)"),
    (mixtral, ["q_proj", "gate_up_proj"]),
    (qwen3_moe, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
    (qwen3_moe, ["q_proj", "experts.down_proj"]),
    (llama4, ["q_proj", "down_proj"]),
]


@both_tuners
@pytest.mark.parametrize(("build", "targets"), NAMED_EXPERTS)
def test_experts_that_are_named_are_refused(tuner, build, targets):
    model = build()
    message = r"asks for the experts in model\.layers\.\*\.\w+\.experts \(2 modules, \d+% .*exclude_modules"
    refuse(model, message, lambda: get_peft_model(model, TUNERS[tuner](r=2, target_modules=targets)))


@both_tuners
@pytest.mark.parametrize("build", [mixtral, qwen3_moe, llama4])
def test_all_linear_says_which_experts_it_leaves_out(tuner, build):
    model = build()
    share = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share /= sum(p.numel() for p in model.parameters())
    message = rf"the experts in model\.layers\.\*\.\w+\.experts \(2 modules, {share:.0%} of"
    with pytest.warns(UserWarning, match=message):
        get_peft_model(model, TUNERS[tuner](r=2, target_modules="all-linear"))


@both_tuners
@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (mixtral, {"target_modules": ["q_proj", "o_proj"]}),
        (qwen3_moe, {"target_modules": r".*self_attn\.(q|v)_proj"}),
        (mixtral, {"target_modules": None}),
        (qwen3_moe, {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": r".*\.experts\..*"}),
    ],
)
def test_where_attention_alone_is_asked_for_nothing_is_said(tuner, build, fields, recwarn):
    model = get_peft_model(build(), TUNERS[tuner](r=2, **fields))
    assert all(".self_attn." in name for name in adapted_layers(model))
    assert not [w for w in recwarn if "the experts in" in str(w.message)]


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_routed_experts_are_refused_where_tokens_have_to_align(shortcut):
    model = switch()
    config = ResLoRAConfig(r=2, target_modules="all-linear", shortcut=shortcut)
    message = rf"shortcut='{shortcut}' .* tokens are routed .*\.experts\.expert_0\.w[io]\).*shortcut='block'"
    refuse(model, message, lambda: get_peft_model(model, config))
    with pytest.raises(ValueError, match="tokens are routed"):
        describe_chains(model, config)
    config.exclude_modules = r".*\bexperts?\b.*"
    assert not any("experts" in name for name in adapted_layers(get_peft_model(model, config)))


class Mixture(nn.Module):
    """A block in which each token goes to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
        self.shared_experts = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x + self.shared_experts(x)
        for number, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0) == bool(number)
            result = result.index_put((chosen,), result[chosen] + expert(x[chosen]))
        return result


def test_routed_experts_work_with_block_and_one_sample_does_not_see_another():
    torch.manual_seed(0)
    base = nn.Sequential(Mixture(), Mixture(), Mixture())
    config = ResLoRAConfig(r=2, target_modules="all-linear", shortcut="block")
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), config).double()).eval()
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    together, alone = model(x), torch.cat([model(x[i : i + 1]) for i in range(4)])
    assert relative_error(together, alone) < 1e-10
    for shortcut in ("input", "middle"):
        other = copy.deepcopy(base)
        refused = ResLoRAConfig(r=2, target_modules="all-linear", shortcut=shortcut)
        refuse(other, r"such as that of 0\.experts\.0\)", lambda: get_peft_model(other, refused))  # noqa: B023
        shared = ResLoRAConfig(r=2, target_modules=["shared_experts"], shortcut=shortcut)
        assert len(adapted_layers(get_peft_model(other, shared))) == 3


# Refusals leave no trace


class Ignorant(nn.Module):
    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__()


TARGETS = ["q_proj", "down_proj"]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing matches": ({"target_modules": ["nothing"]}, "not found"),
    "all excluded": ({"exclude_modules": TARGETS}, "No modules were targeted"),
    "an embedding": ({"target_modules": [*TARGETS, "embed_tokens"]}, "no linear layer"),
    "an activation": ({"target_modules": [*TARGETS, "act_fn"]}, "no linear layer"),
    "tokens of nothing": ({"trainable_token_indices": {"nothing": [1]}}, "nothing"),
    "unequal ranks": ({"shortcut": "middle", "rank_pattern": {"layers.2.mlp.down_proj": 3}}, "one rank in a chain"),
    "a bad pattern": ({"chain_pattern": "q_proj"}, "groups capture"),
    "a layer that ignores variants": ({"target_modules": [*TARGETS, "embed_tokens"]}, "would train plain LoRA"),
    "no layers": ({"layers_to_transform": [17]}, "layers_to_transform"),
    "tied tokens": (
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
        "tied",
    ),
}
RESLORA_ONLY = {"tokens of nothing", "unequal ranks", "a bad pattern", "a layer that ignores variants", "tied tokens"}
CASES = [("middle", case) for case in REFUSED] + [("mora", case) for case in REFUSED if case not in RESLORA_ONLY]


def refused_config(tuner: str, case: str) -> tuple[Any, str]:
    fields, message = REFUSED[case]
    make = ResLoRAConfig if "shortcut" in fields else TUNERS[tuner]
    config = make(**{"r": 2, "target_modules": TARGETS, **fields})
    if case == "a layer that ignores variants":
        config._register_custom_module({nn.Embedding: Ignorant})
    return config, message


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize(("tuner", "case"), CASES)
def test_a_refused_config_leaves_the_model_and_itself_as_they_were(tuner, case):
    model = tied_llama()
    for act in (get_peft_model, lambda m, c: inject_adapter_in_model(c, m), lambda m, c: m.add_adapter(c)):
        config, message = refused_config(tuner, case)
        fields = copy.deepcopy(config.to_dict())
        refuse(model, message, lambda: act(model, config))  # noqa: B023
        assert config.to_dict() | {"base_model_name_or_path": None} == fields
    assert not hasattr(model, "peft_config")
    model.add_adapter(TUNERS[tuner](r=2, target_modules=TARGETS))
    assert len(adapted_layers(model)) == 8


@pytest.mark.parametrize(("tuner", "case"), CASES)
def test_a_refused_second_adapter_leaves_the_first_at_work(tuner, case):
    good = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
    model = randomize_adapters(get_peft_model(tied_llama(), TUNERS[tuner](**good))).train()
    inputs = {"input_ids": torch.randint(1, 53, (2, 5))}
    expected = output_of(model, inputs)
    config, message = refused_config(tuner, case)
    refuse(model, message, lambda: model.add_adapter("second", config))
    refuse(model, message, lambda: inject_adapter_in_model(config, model.base_model.model, "second"))
    refuse(model, message, lambda: inject_adapter_in_model(config, model.base_model.model, "default"))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(output_of(model, inputs), expected)
    model.add_adapter("second", TUNERS[tuner](**good))
    model.set_adapter("second")
    output_of(model, inputs).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all(".second" in name for name in trained)


@every_tuner
def test_an_adapter_of_the_same_name_starts_anew(tuner):
    """As in LoRA, when a cell of a notebook runs twice."""
    base = llama().eval()
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), TUNERS[tuner](r=3, target_modules=TARGETS)))
    inputs = {"input_ids": torch.randint(1, 53, (2, 5))}
    again = get_peft_model(model.base_model.model, TUNERS[tuner](r=2, target_modules=TARGETS)).eval()
    assert relative_error(output_of(again, inputs), output_of(base, inputs)) < 1e-6
    fresh = get_peft_model(copy.deepcopy(base), TUNERS[tuner](r=2, target_modules=TARGETS)).eval()
    expected = output_of(randomize_adapters(fresh), inputs)
    assert relative_error(output_of(randomize_adapters(again), inputs), expected) < 1e-6
    if tuner in ("input", "middle"):
        again.peft_config["default"].merge_estimator = "drop"
    again.merge_adapter()
    third, inner = TUNERS[tuner](r=2, target_modules=TARGETS), again.base_model.model
    refuse(inner, r"'default' is merged into layer model\..*Unmerge", lambda: get_peft_model(inner, third))


@every_tuner
def test_a_second_adapter_with_bias_is_refused_without_a_trace(tuner):
    only = TUNERS[tuner](r=2, target_modules=TARGETS, bias="all")
    model = get_peft_model(llama(), only)
    second = TUNERS[tuner](r=2, target_modules=TARGETS, bias="all")
    refuse(model, "only 1 adapter with bias", lambda: model.add_adapter("second", second))


def test_an_interrupted_injection_leaves_no_trace(monkeypatch):
    model = llama()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_reslora.reslora.model.link_chains", interrupt)
    refuse(model, "", lambda: get_peft_model(model, ResLoRAConfig(target_modules=TARGETS)), KeyboardInterrupt)


def test_refused_layer_replication_leaves_the_number_of_layers():
    model = llama()
    config = ResLoRAConfig(target_modules=["nothing"], layer_replication=[(0, 3), (1, 4)])
    refuse(model, "not found", lambda: get_peft_model(model, config))
    assert len(model.model.layers) == model.config.num_hidden_layers == 4


@both_tuners
def test_an_adapter_of_another_base_leaves_the_model_as_it_was(tuner, tmp_path):
    """Its config names a layer that here is no linear one."""
    other = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    get_peft_model(other, TUNERS[tuner](r=2, target_modules=["first", "second"])).save_pretrained(tmp_path)
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Embedding(4, 4)})
    refuse(model, r"cannot adapt second \(Embedding\)", lambda: PeftModel.from_pretrained(model, tmp_path))


@both_tuners
def test_weights_are_tied_as_with_lora(tuner):
    fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    models = [get_peft_model(tied_llama(), make(**fields)) for make in (TUNERS[tuner], LoraConfig)]
    for model in models:
        head = model.base_model.model.lm_head.modules_to_save["default"].weight
        assert head is model.base_model.model.model.embed_tokens.modules_to_save["default"].weight


# Default targets


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4)}) for _ in range(3)]
        self.language_model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.vision_tower = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        self.config = {"model_type": "gemma4"}


@every_tuner
def test_default_targets_that_are_an_expression(tuner):
    model = Language()
    if tuner != "mora":
        table = describe_chains(model, TUNERS[tuner]())
        assert sum(len(chain) for chain in table.chains) == 6
        assert "6 layers in 2 chains" in str(table)
    model.language_model["layers"][1]["v_proj"] = nn.Embedding(8, 4)
    with pytest.warns(UserWarning, match=r"leaves out language_model\.layers\.1\.v_proj \(Embedding\)"):
        adapted = get_peft_model(model, TUNERS[tuner](r=2))
    names = [f"language_model.layers.{i}.{role}" for i in range(3) for role in ("q_proj", "v_proj")]
    assert adapted_layers(adapted) == [name for name in names if name != "language_model.layers.1.v_proj"]
