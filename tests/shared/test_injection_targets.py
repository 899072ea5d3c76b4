"""Which layers may be adapted: those that cannot be are refused or left out, by both tuners."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from helpers.adapters import both_tuners, config_of, every_tuner, tuner_layers
from helpers.oracle import randomize_adapters, relative_error
from helpers.refusals import refuse
from helpers.tiny_models import TINY_MODELS
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaConfig,
    DebertaModel,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.reformer.modeling_reformer import LSHSelfAttention
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from peft_reslora import MoRAConfig, ResLoRAConfig, describe_chains
from peft_reslora.shared.forwards import weights_read

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=8, patch_size=4))


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50, state_size=4))


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
    config = config_of(tuner, r=2, target_modules=[name])
    message = rf"{name} \(\w+\), which is read by {reader}\w* past its forward.*exclude_modules"
    refuse(model, message, lambda: get_peft_model(model, config))
    keys = {f"{name}.{'mora_M' if tuner == 'mora' else 'lora_A.weight'}": torch.zeros(2, 2)}
    fresh = config_of(tuner, r=2, target_modules=["called"])
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
    model = get_peft_model(build(), config_of(tuner, r=2, target_modules=targets))
    assert list(tuner_layers(model))
    assert not [w for w in recwarn if "leaves out" in str(w.message)]


@both_tuners
def test_bloom_with_slices_reads_its_weights(tuner):
    config = BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50, pretraining_tp=2, slow_but_exact=True)
    model = BloomForCausalLM(config)
    message = r"h\.\*\.mlp\.dense_4h_to_h \(Linear, 2 layers\), which is read by BloomMLP"
    refuse(
        model,
        message,
        lambda: get_peft_model(model, config_of(tuner, target_modules=["query_key_value", "dense_4h_to_h"])),
    )


@every_tuner
def test_without_the_fast_path_an_encoder_layer_is_adapted_in_training_and_evaluation(tuner):
    torch.manual_seed(0)
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        config = config_of(tuner, r=2, target_modules=["linear1", "linear2"])
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
        model = get_peft_model(copy.deepcopy(base), config_of(tuner, r=2, target_modules="all-linear"))
    expected = [
        name for name, m in base.named_modules() if isinstance(m, nn.Linear) and "attention.out_proj" not in name
    ]
    assert list(tuner_layers(model)) == expected
    pixels = torch.randn(2, 3, 8, 8)
    model.train()(pixel_values=pixels).pooler_output.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    randomize_adapters(model).eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert list(tuner_layers(loaded)) == expected
    pooled = model(pixel_values=pixels).pooler_output
    assert relative_error(loaded(pixel_values=pixels).pooler_output, pooled) < 1e-6


@both_tuners
def test_all_linear_on_mamba_adapts_what_its_kernels_do_not_read(tuner):
    with pytest.warns(UserWarning, match=r"layers\.\*\.mixer\.x_proj \(Linear, 2 layers\).*dt_proj.*out_proj"):
        model = get_peft_model(mamba(), config_of(tuner, r=2, target_modules="all-linear"))
    assert list(tuner_layers(model)) == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]


def test_where_nothing_else_is_left_all_linear_is_refused():
    model = nn.MultiheadAttention(8, 2)
    refuse(model, "cannot adapt out_proj", lambda: get_peft_model(model, ResLoRAConfig(target_modules="all-linear")))


def test_a_layer_whose_name_ends_as_that_of_another_is_not_left_out_in_vain():
    """PEFT would choose `attention.out_proj` by the name `out_proj`."""
    model = nn.ModuleDict({"out_proj": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2)})
    refuse(model, r"attention\.out_proj", lambda: get_peft_model(model, ResLoRAConfig(target_modules="all-linear")))
    config = ResLoRAConfig(target_modules="all-linear", exclude_modules=r"attention\.out_proj")
    assert list(tuner_layers(get_peft_model(model, config))) == ["out_proj"]


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
        model = get_peft_model(Processed(), config_of(tuner, r=2, target_modules="all-linear"))
    assert list(tuner_layers(model)) == ["out"]


@both_tuners
def test_a_forward_of_the_module_itself_counts(tuner):
    """As the kernels of transformers and others set it; accelerate's hooks keep the class's."""
    model = Tied()
    add_hook_to_module(model, ModelHook())
    assert list(tuner_layers(get_peft_model(copy.deepcopy(model), config_of(tuner, target_modules=["called"])))) == [
        "called"
    ]
    refuse(model, "read by Tied", lambda: get_peft_model(model, config_of(tuner, target_modules=["read"])))
    remove_hook_from_module(model)
    model.forward = fused.__get__(model)
    refuse(model, "read by Tied", lambda: get_peft_model(model, config_of(tuner, target_modules=["called"])))
    assert list(tuner_layers(get_peft_model(model, config_of(tuner, target_modules=["read"])))) == ["read"]


def test_an_adapter_that_was_saved_with_such_a_layer_still_loads(monkeypatch, tmp_path):
    """Version 0.1.0 adapted the layer, where the adapter had no effect."""
    monkeypatch.setattr("peft_reslora.shared.targets.reader_of", lambda name, modules: None)
    base = siglip()
    model = randomize_adapters(get_peft_model(copy.deepcopy(base), ResLoRAConfig(r=2, target_modules="all-linear")))
    assert "head.attention.out_proj" in tuner_layers(model)
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
    refuse(model, message, lambda: get_peft_model(model, config_of(tuner, target_modules=["first", "other"])))


@both_tuners
def test_subclasses_that_compute_the_same_are_adapted(tuner):
    model = nn.Sequential(Plain(8, 6, bias=False), Plain(6, 8))
    assert list(tuner_layers(get_peft_model(model, config_of(tuner, r=2, target_modules=["0", "1"])))) == ["0", "1"]


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
        table = describe_chains(model, config_of(tuner))
        assert sum(len(chain) for chain in table.chains) == 6
        assert "6 layers in 2 chains" in str(table)
    model.language_model["layers"][1]["v_proj"] = nn.Embedding(8, 4, max_norm=1.0)
    with pytest.warns(UserWarning, match=r"leaves out language_model\.layers\.1\.v_proj \(Embedding\)"):
        adapted = get_peft_model(model, config_of(tuner, r=2))
    names = [f"language_model.layers.{i}.{role}" for i in range(3) for role in ("q_proj", "v_proj")]
    assert list(tuner_layers(adapted)) == [name for name in names if name != "language_model.layers.1.v_proj"]


@pytest.mark.parametrize("config", [ResLoRAConfig, MoRAConfig])
def test_all_linear_of_a_model_without_linear_layers_is_refused(config):
    with pytest.raises(ValueError, match=r"Sequential has no linear layers that .* could adapt. Name other layers"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), config(target_modules="all-linear"))
