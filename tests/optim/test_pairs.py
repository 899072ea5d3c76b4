"""Which factors are pairs, which are not, and what is said of those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import MODEL64
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.optim import FactorPair, LoRAPro, LoRARite, factor_pairs, remaining_parameters
from peft_reslora.training.annealing import anneal_shortcuts

TARGETS = ["q_proj", "v_proj"]


def adapted(config: PeftConfig) -> nn.Module:
    return randomize_adapters(get_peft_model(TINY_MODELS["llama"].make(), config))


def reslora(shortcut: str, **fields: Any) -> nn.Module:
    return adapted(ResLoRAConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **fields}, shortcut=shortcut))


def run_backward(model: nn.Module) -> None:
    ids = TINY_MODELS["llama"].inputs()["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()


PAIRED: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=3, target_modules=TARGETS),
    "lora embedding": LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"]),
    "dora": LoraConfig(r=3, target_modules=TARGETS, use_dora=True),
    "rslora pattern": LoraConfig(r=3, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 2}),
    "input": ResLoRAConfig(r=3, target_modules=TARGETS, shortcut="input"),
    "block": ResLoRAConfig(r=3, target_modules=TARGETS, shortcut="block", pre_num=-1),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", list(PAIRED))
def test_the_loss_depends_on_each_pair_through_its_product_alone(kind):
    """Then g_A A^T = s B^T G A^T = B^T g_B, and with no other factors would it be so."""
    model = adapted(PAIRED[kind])
    pairs = factor_pairs(model)
    assert [pair.layer for pair in pairs] == [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    run_backward(model)
    for pair in pairs:
        assert pair.scaling == model.get_submodule(pair.layer).scaling["default"]
        assert relative_error(pair.A.grad @ pair.A.T, pair.B.T @ pair.B.grad) < MODEL64, pair.layer


@pytest.mark.usefixtures("float64")
def test_middle_has_no_pairs_and_is_refused():
    model = reslora("middle")
    run_backward(model)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    A, B = layer.block_of("default").weights
    assert relative_error(A.grad @ A.T, B.T @ B.grad) > 0.1
    with pytest.raises(
        ValueError, match=r"layer 'base_model\S*layers.0\S*q_proj' .*'middle'.*'input' and 'block'.*AdamW"
    ):
        factor_pairs(model)


def test_middle_in_chains_of_one_layer_is_a_lora_and_has_pairs():
    config = ResLoRAConfig(target_modules=["first"], shortcut="middle")
    with pytest.warns(UserWarning, match="no shortcut at all"):
        model = get_peft_model(nn.ModuleDict({"first": nn.Linear(4, 5)}), config)
    assert len(factor_pairs(model)) == 1


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mora": (lambda: adapted(MoRAConfig(r=3, target_modules=TARGETS)), r"q_proj' .*no factors A and B.*AdamW"),
    "loha": (lambda: adapted(LoHaConfig(r=3, target_modules=TARGETS)), r"q_proj' .*no factors A and B.*AdamW"),
    "adalora": (
        lambda: adapted(AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=TARGETS)),
        r"q_proj' \(SVDLinear\): AdaLoRA's update is B diag\(E\) A.*AdamW",
    ),
    "convolution": (
        lambda: get_peft_model(nn.ModuleDict({"conv": nn.Conv2d(4, 5, 2)}), LoraConfig(r=3, target_modules=["conv"])),
        r"conv': a pair is .* A \(3, 4, 2, 2\), B \(5, 3, 1, 1\).*Leave out the layer \(convolutions",
    ),
    "variant": (
        lambda: adapted(LoraConfig(r=4, target_modules=TARGETS, use_bdlora=bdlora())),
        r"q_proj' .*BdLoraLinearVariant computes something else",
    ),
    "frozen": (lambda: frozen(reslora("block"), "lora_"), "All are frozen: make it active with set_adapter"),
    "frozen a": (lambda: frozen(reslora("block"), "lora_A"), r"q_proj': A is frozen.*create_lorafa_optimizer"),
    "frozen b": (lambda: frozen(reslora("block"), "lora_B"), r"q_proj': B is frozen"),
    "no adapter": (lambda: TINY_MODELS["llama"].make(), r"no factors that are trained.*has the adapters \[\]"),
    "shared": (lambda: shared(reslora("block")), r"'\S*q_proj' and '\S*v_proj' hold the same factor"),
    "scaling": (lambda: unscaled(reslora("block")), r"q_proj': scaling=0.0 must be finite and not 0.*set_scale"),
}


def bdlora() -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    return BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)


def frozen(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            parameter.requires_grad_(False)
    return model


def shared(model: nn.Module) -> nn.Module:
    attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
    attention.v_proj.lora_A["default"].weight = attention.q_proj.lora_A["default"].weight
    return model


def unscaled(model: nn.Module) -> nn.Module:
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling["default"] = 0.0
    return model


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_has_no_pairs_is_refused_by_the_layers_name(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        factor_pairs(make())


def test_experts_as_one_parameter_are_refused():
    model = nn.ModuleDict({"experts": Experts()})
    config = LoraConfig(r=3, target_modules=[], target_parameters=["experts.weight"])
    with pytest.raises(ValueError, match=r"experts' \(ParamWrapper\): with target_parameters each expert"):
        factor_pairs(get_peft_model(model, config))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 5))


def test_an_adapter_that_is_being_annealed_is_refused():
    model = reslora("input", merge_estimator="drop")
    assert factor_pairs(model)
    anneal_shortcuts(model, 0.5)
    with pytest.raises(ValueError, match=r"layers.1\S*q_proj' .*being annealed.*AdamW"):
        factor_pairs(model)


def test_frozen_layers_are_left_out():
    model = frozen(reslora("block"), "layers.1.")
    assert {pair.layer for pair in factor_pairs(model)} == {
        f"base_model.model.model.layers.{n}.self_attn.{target}" for n in (0, 2, 3) for target in TARGETS
    }


def test_the_adapter_is_chosen_by_name():
    model = reslora("block")
    model.add_adapter("other", ResLoRAConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="All are frozen"):
        factor_pairs(model, "other")
    model.set_adapter("other")
    assert {pair.A.shape for pair in factor_pairs(model, "other")} == {(2, 24)}
    with pytest.raises(ValueError, match=r"'third' has no factors.*\['default', 'other'\]"):
        factor_pairs(model, "third")


def test_remaining_parameters_are_magnitudes_and_modules_to_save():
    config = LoraConfig(r=3, target_modules=TARGETS, use_dora=True, modules_to_save=["lm_head"])
    model = get_peft_model(TINY_MODELS["llama"].make(), config)
    rest = {id(p) for p in remaining_parameters(model, factor_pairs(model))}
    names = {name for name, p in model.named_parameters() if id(p) in rest}
    magnitudes = {name for name in names if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 8
    assert names - magnitudes == {"base_model.model.lm_head.modules_to_save.default.weight"}


# Pairs made by hand, or changed by an engine.


def hand_made(A: tuple[int, ...], B: tuple[int, ...], device: str = "cpu") -> FactorPair:
    return FactorPair("layers.3.q", torch.ones(A, device=device), torch.ones(B, device=device), 1.0)


MISFITS = {
    "ranks": (hand_made((3, 5), (4, 2)), ValueError, r"'layers.3.q': a pair is .* A \(3, 5\), B \(4, 2\).*AdamW"),
    "dimensions": (hand_made((15,), (4, 3)), ValueError, r"'layers.3.q': .*A \(15,\).*ZeRO"),
    "rank 0": (hand_made((0, 5), (4, 0)), ValueError, r"'layers.3.q': its rank is 0.*Leave out"),
    "offloaded": (hand_made((3, 5), (4, 3), "meta"), RuntimeError, r"'layers.3.q': A is offloaded.*DDP.*AdamW"),
    "gathered away": (hand_made((0,), (0,)), RuntimeError, r"'layers.3.q': A is sharded.*DDP.*AdamW"),
    "no pair": (torch.ones(3), ValueError, r"takes pairs, as from factor_pairs\(model\), and got a Tensor"),
}


@pytest.mark.parametrize("optimizer", [LoRAPro, LoRARite])
@pytest.mark.parametrize("kind", list(MISFITS))
def test_optimizers_refuse_what_is_no_pair(optimizer, kind):
    pair, error, message = MISFITS[kind]
    with pytest.raises(error, match=message):
        optimizer([pair])


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_factors_are_refused_also_where_an_engine_brings_them_in_later():
    mesh = init_device_mesh("cpu", (1,))
    whole = FactorPair("layers.3.q", *(nn.Parameter(torch.ones(shape)) for shape in ((3, 5), (4, 3))), 1.0)
    optimizer = LoRARite([whole])
    sharded = [nn.Parameter(distribute_tensor(factor.detach(), mesh)) for factor in (whole.A, whole.B)]
    with pytest.raises(RuntimeError, match=r"'layers.3.q': A is sharded.*DDP"):
        LoRAPro([FactorPair("layers.3.q", *sharded, 1.0)])
    optimizer.param_groups[0]["params"][:] = sharded
    with pytest.raises(RuntimeError, match=r"'layers.3.q': A is sharded.*DDP"):
        optimizer.step()
    optimizer.param_groups[0]["params"][:] = [torch.ones(27)]
    with pytest.raises(ValueError, match=r"'layers.3.q' has 1 parameters for 1 pairs.*ZeRO and FSDP1"):
        optimizer.step()
