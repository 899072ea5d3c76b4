"""Merging into weights that are shared with another module, computed from other tensors, or kept elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from helpers.adapters import adapted, config_of, tuner_layers
from helpers.oracle import relative_error
from helpers.tiny_models import narrow_llama
from peft import PeftModel
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from peft_reslora import export_lora

TUNERS = ["block", "middle", "mora"]
IDS = torch.tensor([[5, 3, 9, 1, 2]])


def merging(base: nn.Module, tuner: str, **fields: Any) -> PeftModel:
    """Adapted, and merged by what needs no data."""
    estimator = {} if tuner == "mora" else {"merge_estimator": "weight_norm"}
    return adapted(base, config_of(tuner, r=2, **estimator, **fields))


class Stack(nn.Module):
    """Linear layers one after the other, in numbered blocks."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(6, 6)}) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["lin"](x))
        return x


def merged_in_float64(base: nn.Module, model: nn.Module) -> dict[str, torch.Tensor]:
    """The dense merged weight of each layer, from the weight before and the delta weight."""
    layers = tuner_layers(model)
    return {
        name: base.get_submodule(name).weight.detach().double() + layer.get_delta_weight("default").double()
        for name, layer in layers.items()
    }


@torch.no_grad()
def dense(base: nn.Module, weights: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """What `base` computes in float64 with these weights in the layers named, and every other weight as it was."""
    base = copy.deepcopy(base).double()
    for name, weight in weights.items():
        base.get_submodule(name).weight = nn.Parameter(weight)
    output = base(*args, **kwargs)
    return output.logits if hasattr(output, "logits") else output


def tied_llama() -> tuple[nn.Module, list[str]]:
    return narrow_llama(2, tie_word_embeddings=True), ["lm_head", "q_proj"]


def tied_bart() -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=17,
        d_model=8,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
        init_std=0.3,
    )
    return BartForConditionalGeneration(config).eval(), ["lm_head", "fc1"]


TIED = {"llama": tied_llama, "bart": tied_bart}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("name", TIED)
def test_a_merge_into_a_tied_weight_leaves_the_embedding_alone(name, tuner, tmp_path):
    """The merged model computes what a model with a head of its own does, and so it is loaded again."""
    base, targets = TIED[name]()
    model = merging(copy.deepcopy(base), tuner, target_modules=targets)
    expected = dense(base, merged_in_float64(base, model), IDS)
    unmerged = model(IDS).logits
    model.merge_adapter()
    merged = model(IDS).logits
    model.unmerge_adapter()
    head, embedding = model.get_base_model().lm_head.base_layer, model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert torch.equal(embedding.weight, base.get_input_embeddings().weight)
    assert torch.equal(model(IDS).logits, unmerged)
    unloaded = model.merge_and_unload()
    assert unloaded.config.tie_word_embeddings is False
    unloaded.save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path).eval()
    for logits in (merged, unloaded(IDS).logits, loaded(IDS).logits):
        assert relative_error(logits, expected) < 1e-5
    names = [n for n, _ in unloaded.named_parameters(remove_duplicate=False)]
    assert all(torch.equal(loaded.get_parameter(n), unloaded.get_parameter(n)) for n in names)


def umt5() -> nn.Module:
    return UMT5ForConditionalGeneration(
        UMT5Config(d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=17, tie_word_embeddings=True)
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, vocab_size=17))


@pytest.mark.parametrize("tuner", ["block", "mora"])
@pytest.mark.parametrize("build", [t5, umt5])
def test_a_tied_weight_that_cannot_be_untied_is_refused_and_nothing_changed(build, tuner):
    """These scale their output by whether the config says that the head is tied."""
    model = merging(build(), tuner, target_modules=["lm_head", "wo"])
    before = {name: (p, p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    with pytest.raises(ValueError, match=r"layer 'lm_head' is tied.*exclude_modules"):
        model.merge_and_unload()
    for name, (parameter, value) in before.items():
        assert model.get_parameter(name) is parameter
        assert torch.equal(parameter, value)
    assert model.get_base_model().config.tie_word_embeddings
    model.merge_adapter()  # for the time being the config need not say anything
    model.unmerge_adapter()
    assert all(model.get_parameter(name) is parameter for name, (parameter, _) in before.items())


def same_parameter(stack: Stack) -> None:
    stack.layers[2]["lin"].weight = stack.layers[0]["lin"].weight


def same_memory(stack: Stack) -> None:
    stack.layers[2]["lin"].weight = nn.Parameter(stack.layers[0]["lin"].weight.data)


@pytest.mark.parametrize("safe_merge", [True, False])
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("share", [same_parameter, same_memory])
def test_layers_that_share_a_weight_merge_each_for_itself(share, tuner, safe_merge):
    base, shared = Stack(), Stack()
    share(base)
    share(shared)
    model = merging(shared, tuner, target_modules=["lin"])
    x = torch.randn(4, 6)
    expected = dense(base, merged_in_float64(base, model), x.double())
    layers = list(tuner_layers(model).values())
    before = [layer.base_layer.weight for layer in layers]
    values = [weight.clone() for weight in before]
    for _ in range(2):
        model.merge_adapter(safe_merge=safe_merge)
        assert relative_error(model(x), expected) < 1e-5
        model.unmerge_adapter()
        for layer, weight, value in zip(layers, before, values, strict=True):
            assert layer.base_layer.weight is weight
            assert torch.equal(weight, value)
    assert before[0].data_ptr() == before[2].data_ptr()
    assert relative_error(model.merge_and_unload(safe_merge=safe_merge)(x), expected) < 1e-5


@pytest.mark.parametrize("tuner", ["block", "middle"])
def test_replicated_layers_merge_each_for_itself(tuner):
    base = narrow_llama(2)
    model = merging(
        copy.deepcopy(base), tuner, target_modules=["q_proj", "up_proj"], layer_replication=[[0, 2], [0, 2]]
    )
    base.model.layers = nn.ModuleList(copy.deepcopy(base.model.layers[i]) for i in (0, 1, 0, 1))
    for index, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = index
    base.config.num_hidden_layers = 4
    expected = dense(base, merged_in_float64(base, model), IDS, use_cache=False)
    unmerged = model(IDS, use_cache=False).logits
    model.merge_adapter()
    assert relative_error(model(IDS, use_cache=False).logits, expected) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(model(IDS, use_cache=False).logits, unmerged)
    assert relative_error(model.merge_and_unload()(IDS, use_cache=False).logits, expected) < 1e-5


@pytest.mark.parametrize("tuner", TUNERS)
def test_layers_can_be_merged_one_by_one(tuner):
    """As diffusers' `fuse_lora` does, which knows no tuner."""
    base, targets = tied_llama()
    model = merging(copy.deepcopy(base), tuner, target_modules=targets)
    expected = dense(base, merged_in_float64(base, model), IDS)
    layers = tuner_layers(model).values()
    for layer in layers:
        layer.merge()
    assert relative_error(model(IDS).logits, expected) < 1e-5
    for layer in layers:
        layer.unmerge()
    assert model.get_base_model().lm_head.base_layer.weight is model.get_input_embeddings().weight
    for name, layer in tuner_layers(model).items():
        assert torch.equal(layer.base_layer.weight, base.get_submodule(name).weight)


def test_deep_copies_of_merged_models_keep_what_was_tied():
    base, targets = tied_llama()
    model = merging(base, "block", target_modules=targets)
    model.merge_adapter()
    twin = copy.deepcopy(model).double()
    twin.unmerge_adapter()
    assert twin.get_base_model().lm_head.base_layer.weight is twin.get_input_embeddings().weight
    assert twin.get_input_embeddings().weight.dtype == torch.float64
    assert twin.get_input_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_module_that_is_also_called_without_its_adapter_is_refused(tuner):
    base = Stack()
    base.second_name = base.layers[1]["lin"]
    model = merging(base, tuner, target_modules=r"layers\.\d+\.lin")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'layers\.1\.lin' is also the module 'second_name'"):
            merge()
    assert not any(layer.merged for layer in tuner_layers(model).values())


def by_parametrization(linear: nn.Linear) -> None:
    parametrizations.weight_norm(linear)
    linear.parametrizations.weight.original0.data.mul_(1.5)


def by_older_hook(linear: nn.Linear) -> None:
    nn.utils.weight_norm(linear)
    linear.weight_g.data.mul_(1.5)  # `weight` is as it was until the next call


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("compute", [by_parametrization, by_older_hook])
def test_a_weight_that_is_computed_is_not_merged_into_but_exported(compute, tuner):
    base = Stack()
    for layer in base.layers:
        compute(layer["lin"])
    model = merging(base, tuner, target_modules=["lin"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    x = torch.randn(4, 6)
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload, tuner_layers(model)["layers.1.lin"].merge):
        with pytest.raises(ValueError, match=r"layer 'layers\.[01]\.lin', whose weight is computed anew"):
            merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(model(x), expected)
    rank = None if tuner != "mora" else 6
    export = export_lora(model, rank=rank).state_dict
    for name, layer in tuner_layers(model).items():
        lora_a, lora_b = (export[f"base_model.model.{name}.lora_{f}.weight"] for f in "AB")
        assert relative_error(lora_b @ lora_a, layer.get_delta_weight("default")) < 1e-5


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("compute", [by_parametrization, by_older_hook])
def test_norms_of_computed_weights_are_those_of_the_layer_as_it_computes(compute):
    base, computed = Stack(), Stack()
    for layer in [*base.layers, *computed.layers]:
        compute(layer["lin"])
    model = merging(computed, "middle", target_modules=["lin"])
    for layer in base.layers:  # the same weights, as parameters
        linear = layer["lin"]
        linear(torch.zeros(1, 6))
        if compute is by_parametrization:
            parametrize.remove_parametrizations(linear, "weight")
        else:
            nn.utils.remove_weight_norm(linear)
    plain = merging(base, "middle", target_modules=["lin"])
    for name, layer in tuner_layers(model).items():
        expected = tuner_layers(plain)[name].get_delta_weight("default")
        assert relative_error(layer.get_delta_weight("default"), expected) < 1e-6


def to_memory(model: nn.Module, folder: Any) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


def to_disk(model: nn.Module, folder: Any) -> None:
    disk_offload(model, folder, execution_device=torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:.*not supported.*offload:UserWarning")
@pytest.mark.parametrize("tuner", ["input", *TUNERS])
@pytest.mark.parametrize("offload", [to_memory, to_disk])
@torch.no_grad()
def test_offloaded_models_merge_as_loaded_ones(offload: Callable[..., None], tuner, tmp_path):
    base, targets = tied_llama()
    model = merging(base, tuner, target_modules=targets)
    loaded = copy.deepcopy(model)
    offload(model, tmp_path)
    assert model.get_base_model().lm_head.base_layer.weight.is_meta
    unmerged = model(input_ids=IDS).logits
    rank = 12 if tuner == "mora" else None
    ours, theirs = (export_lora(m, rank=rank).state_dict for m in (model, loaded))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    for _ in range(2):
        loaded.merge_adapter()
        model.merge_adapter()
        assert relative_error(model(input_ids=IDS).logits, loaded(input_ids=IDS).logits) < 1e-6
        assert model.get_base_model().lm_head.base_layer.weight.is_meta
        model.unmerge_adapter()
        loaded.unmerge_adapter()
        assert torch.equal(model(input_ids=IDS).logits, unmerged)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges in the forward pass
        plain = model(input_ids=IDS).logits
    with loaded.disable_adapter():
        assert relative_error(plain, loaded(input_ids=IDS).logits) < 1e-6
    merged = model.merge_and_unload()
    assert relative_error(merged(input_ids=IDS).logits, loaded.merge_and_unload()(input_ids=IDS).logits) < 1e-6
    assert isinstance(merged, PreTrainedModel)
