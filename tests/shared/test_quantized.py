"""Quantized base models: the gradients of the dequantized one; save, load, merge, export; refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.adapters import TUNERS, adapted, config_of, tuner_layers
from helpers.gradients import assert_gradients_close, gradients
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import LLAMA_INPUTS, TINY_MODELS, output_of
from helpers.tolerances import half_rounding, rounding
from peft import PeftModel, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_reslora import ResLoRAConfig, export_lora
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.shared.quantized import dequantized_weight

TARGETS = TINY_MODELS["llama"].targets


def base() -> nn.Module:
    """Wide enough for groups of 64 weights."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=53,
        max_position_embeddings=32,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.1,
        attention_bias=True,
        mlp_bias=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def _replace_linears(model: nn.Module, quantize: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.model.get_submodule(parent), leaf, quantize(module))
    return model


def nf4(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def quantize(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        quantized = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        quantized.bias = linear.bias
        quantized.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized
        )
        return quantized.to("cpu")

    model.is_loaded_in_4bit = True
    return _replace_linears(model, quantize)


def int8(model: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")

    def quantize(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        quantized = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        quantized.bias = linear.bias
        quantized.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return quantized.to("cpu")

    model.is_loaded_in_8bit = True
    return _replace_linears(model, quantize)


def hqq(model: nn.Module) -> nn.Module:
    module = pytest.importorskip("hqq.core.quantize")
    scheme = module.BaseQuantizeConfig(nbits=4, group_size=64)

    def quantize(linear: nn.Linear) -> nn.Module:
        return module.HQQLinear(linear, scheme, compute_dtype=torch.float32, device="cpu", del_orig=False)

    return _replace_linears(model, quantize)


def torchao(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    scheme = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model.model, scheme, filter_fn=lambda module, name: isinstance(module, nn.Linear))
    # What transformers leaves on a model it has quantized, for PEFT to quantize merged weights again.
    config = SimpleNamespace(get_apply_tensor_subclass=lambda: scheme)
    model.hf_quantizer = SimpleNamespace(quantization_config=config)
    return model


BACKENDS: dict[str, Callable[[nn.Module], nn.Module]] = {"nf4": nf4, "int8": int8, "hqq": hqq, "torchao": torchao}
LABELS = {
    "nf4": "bitsandbytes 4-bit",
    "int8": "bitsandbytes 8-bit",
    "hqq": "HQQ",
    "torchao": "torchao int8 weight-only",
}
quick = pytest.mark.quick(tuner=["middle", "mora"])
supported = pytest.mark.support(lambda backend, **_: f"{LABELS[backend]}: a step, save, load, merge, export")


def dequantized(model: nn.Module) -> nn.Module:
    plain = base()
    linears = [name for name, module in plain.model.named_modules() if isinstance(module, nn.Linear)]
    for name in linears:
        weight = dequantize_module_weight(model.model.get_submodule(name)).detach().float()
        plain.model.get_submodule(name).weight.data = weight.clone()
    return plain


def in_training(model: nn.Module, tuner: str, **fields: Any) -> nn.Module:
    return adapted(model, config_of(tuner, r=4, target_modules=TARGETS, **fields)).train()


def pair(backend: str, tuner: str, **fields: Any) -> tuple[nn.Module, nn.Module]:
    """An adapter on the quantized base, and the same one on the dequantized base."""
    quantized = BACKENDS[backend](base())
    plain = dequantized(quantized)
    return in_training(quantized, tuner, **fields), in_training(plain, tuner, **fields)


@supported
@quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_a_step_is_that_of_the_dequantized_base(backend, tuner):
    quantized, plain = pair(backend, tuner)
    for model in (quantized, plain):
        output_of(model, LLAMA_INPUTS).square().mean().backward()
    assert_gradients_close(gradients(quantized), gradients(plain))
    for model in (quantized, plain):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with torch.no_grad():
        assert relative_error(output_of(quantized, LLAMA_INPUTS), output_of(plain, LLAMA_INPUTS)) < rounding(plain)


@supported
@quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_an_adapter_is_saved_loaded_and_exported(backend, tuner, tmp_path):
    quantized, plain = pair(backend, tuner)
    expected = output_of(quantized, LLAMA_INPUTS)
    quantized.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(BACKENDS[backend](base()), tmp_path).train()
    assert torch.equal(output_of(loaded, LLAMA_INPUTS), expected)
    options = {"rank": 4} if tuner == "mora" else {}
    if tuner in ("input", "middle"):
        for model in (quantized, plain):
            output_of(model, LLAMA_INPUTS)  # records norms
    exported = [export_lora(model, **options).state_dict for model in (quantized, plain)]
    for name, factor in exported[1].items():
        assert relative_error(exported[0][name], factor) <= rounding(64 * 96), name  # MoRA's are from an SVD


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    layers = tuner_layers(model).items()
    return {name: dequantized_weight(layer.get_base_layer()).clone() for name, layer in layers}


@supported
@quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_merging_quantizes_the_merged_weight_and_unmerging_restores_bit_for_bit(backend, tuner):
    quantized, plain = pair(backend, tuner)
    for model in (quantized, plain):
        output_of(model, LLAMA_INPUTS)
    before = base_weights(quantized)
    unmerged = output_of(quantized, LLAMA_INPUTS)
    layers = tuner_layers(plain)
    quantized.merge_adapter()
    for name, layer in tuner_layers(quantized).items():
        merged = dequantized_weight(layer.get_base_layer()).float()
        expected = layers[name].get_base_layer().weight + layers[name].get_delta_weight("default")
        # The steps of 4 and of 8 bits between the largest and the smallest weight of a group.
        assert relative_error(merged, expected) < {"nf4": 0.15, "hqq": 0.15}.get(backend, 0.02), name
        assert torch.equal(layer.get_base_layer().bias, layers[name].get_base_layer().bias), name
    quantized.unmerge_adapter()
    assert all(torch.equal(value, base_weights(quantized)[name]) for name, value in before.items())
    assert relative_error(output_of(quantized, LLAMA_INPUTS), unmerged) < rounding(plain)


@supported
@quick
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_merge_and_unload_gives_the_merged_model(backend, tuner):
    quantized, plain = pair(backend, tuner)
    output_of(quantized, LLAMA_INPUTS)
    twin = copy.deepcopy(quantized)
    twin.merge_adapter()
    expected = output_of(twin, LLAMA_INPUTS)
    assert relative_error(output_of(quantized.merge_and_unload().train(), LLAMA_INPUTS), expected) < rounding(plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tuner", ["input", "middle"])
@torch.no_grad()
def test_weight_norm_reads_the_dequantized_weight(backend, tuner):
    quantized, plain = pair(backend, tuner, merge_estimator="weight_norm")
    layers = dict(plain.named_modules())
    for name, layer in quantized.named_modules():
        if isinstance(layer, ResLoRALayer):
            expected = layers[name].get_delta_weight("default")
            assert relative_error(layer.get_delta_weight("default"), expected) < rounding(plain)
    assert output_of(quantized, LLAMA_INPUTS).isfinite().all(), "reading the weights broke the layers"
    base_weights(quantized)
    assert output_of(quantized, LLAMA_INPUTS).isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tuner", TUNERS[:3])
@torch.no_grad()
def test_mixed_batches_use_each_rows_adapter(backend, tuner):
    model, plain = pair(backend, tuner)
    model.add_adapter("other", ResLoRAConfig(r=2, target_modules=TARGETS, shortcut=tuner))
    randomize_adapters(model, seed=3).eval()
    expected = []
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        expected.append(output_of(model, LLAMA_INPUTS)[row])
    actual = model(**LLAMA_INPUTS, adapter_names=["default", "other"]).logits
    # 8-bit activations are scaled by what else is in the batch; nf4 has another kernel for single rows, in bfloat16.
    bound = {"int8": 0.1, "nf4": half_rounding(3 * 30, torch.bfloat16)}.get(backend, rounding(plain))
    assert relative_error(actual, torch.stack(expected)) < bound


@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_a_repacked_4bit_weight_is_refused(tuner):
    """bitsandbytes repacks in the first evaluation on some CPUs; PEFT would misread the weight."""
    model, _ = pair("nf4", tuner)
    output_of(model, LLAMA_INPUTS)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    layer.get_base_layer().weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj.*repacked.*Load the base model again"):
        layer.merge()


class _StandInGPTQ(nn.Module):
    """As much of gptqmodel's layer as PEFT asks for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach().clone())
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.qweight.t() + self.bias


@pytest.mark.support("GPTQ (a stand-in for its layer): a step")
@pytest.mark.parametrize("tuner", TUNERS[:3])
def test_gptq_layers_keep_their_shortcuts(tuner):
    """With a stand-in for the base layer and PEFT's own GPTQ layer around it."""
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config = ResLoRAConfig(r=4, target_modules=TARGETS, shortcut=tuner)
    config._register_custom_module({_StandInGPTQ: GPTQLoraLinear})
    model = adapted(_replace_linears(base(), _StandInGPTQ), config).train()
    assert type(model.base_model.model.model.layers[0].mlp.up_proj).__name__ == "GPTQLoraLinear"
    plain = in_training(base(), tuner)
    for candidate in (model, plain):
        output_of(candidate, LLAMA_INPUTS).square().mean().backward()
    assert_gradients_close(gradients(model), gradients(plain))


@pytest.mark.support(
    "AWQ, AQLM, EETQ, TransformerEngine, Megatron", verdict="refused", columns=["input", "block", "middle"]
)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("awq", "AwqLoraLinear"),
        ("aqlm", "AqlmLoraLinear"),
        ("eetq", "EetqLoraLinear"),
        ("te", "TeLinear"),
        ("tp_layer", "LoraParallelLinear"),
    ],
)
def test_layers_that_would_train_plain_lora_are_refused(module, name):
    """With a stand-in of the same name and module as PEFT's layer, whose package need not be installed."""

    def construct(self: nn.Module, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)

    stand_in = type(name, (nn.Module,), {"__module__": f"peft.tuners.lora.{module}", "__init__": construct})
    config = ResLoRAConfig(r=4, target_modules=TARGETS)
    config._register_custom_module({_StandInGPTQ: stand_in})
    with pytest.raises(
        ValueError, match=rf"layers\.0\.self_attn\.q_proj.*{name}.*would train plain LoRA.*exclude_modules"
    ):
        get_peft_model(_replace_linears(base(), _StandInGPTQ), config)
