"""The promises that every tuner and shortcut keeps. A new tuner joins by adding a line to TUNERS."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapters import adapted, tuner_layers
from helpers.gradients import assert_gradients_close, gradients
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import MODEL64, half_rounding, rounding
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from peft_reslora import MoRAConfig, ResLoRAConfig, export_lora, save_as_lora

TUNERS: dict[str, Callable[..., PeftConfig]] = {
    "reslora-input": lambda **f: ResLoRAConfig(shortcut="input", merge_estimator="weight_norm", **f),
    "reslora-block": lambda **f: ResLoRAConfig(shortcut="block", **f),
    "reslora-block-all": lambda **f: ResLoRAConfig(shortcut="block", pre_num=-1, **f),
    "reslora-middle": lambda **f: ResLoRAConfig(shortcut="middle", pre_num=2, merge_estimator="weight_norm", **f),
    "reslora-block-dora": lambda **f: ResLoRAConfig(shortcut="block", use_dora=True, **f),
    "reslora-input-adalora": lambda **f: adalora(shortcut="input", merge_estimator="weight_norm", **f),
    "reslora-block-adalora": lambda **f: adalora(shortcut="block", pre_num=2, **f),
    "reslora-middle-adalora": lambda **f: adalora(shortcut="middle", merge_estimator="weight_norm", **f),
    "reslora-middle-nested": lambda **f: ResLoRAConfig(
        shortcut="middle", nested_ranks=True, merge_estimator="weight_norm", **f
    ),
    "mora-sharing": lambda **f: MoRAConfig(mora_type="sharing", **f),
    "mora-decoupling": lambda **f: MoRAConfig(mora_type="decoupling", **f),
    "mora-rotation": lambda **f: MoRAConfig(mora_type="rotation", **f),
}
MERGES_EXACTLY = {name for name in TUNERS if name.startswith(("reslora-block", "mora"))}
# Other kinds of blocks: quick where a test says so.
KINDS = [name for name in TUNERS if name.endswith(("dora", "adalora", "nested"))]
PLAIN = [name for name in TUNERS if name not in KINDS]
TINY = TINY_MODELS["llama"]

pytestmark = pytest.mark.usefixtures("float64")


def every_tuner(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.quick(tuner=PLAIN)(pytest.mark.parametrize("tuner", TUNERS)(test))


also_quick = pytest.mark.quick(tuner=["reslora-block-dora", "reslora-middle-adalora"])


def adalora(r: int, **fields: Any) -> ResLoRAConfig:
    return ResLoRAConfig(init_r=r, target_r=1, total_step=50, **fields)


def config_of(tuner: str, **fields: Any) -> PeftConfig:
    return TUNERS[tuner](**{"r": 3, "target_modules": TINY.targets, **fields})


def prepared(tuner: str, **fields: Any) -> tuple[nn.Module, PeftModel, dict]:
    """A base model, a copy of it with a random adapter, and inputs."""
    base = TINY.make()
    return base, adapted(copy.deepcopy(base), config_of(tuner, **fields)), TINY.inputs()


@also_quick
@every_tuner
def test_the_new_adapter_changes_nothing(tuner):
    base, inputs = TINY.make(), TINY.inputs()
    model = get_peft_model(copy.deepcopy(base), config_of(tuner))
    assert torch.equal(output_of(model, inputs), output_of(base, inputs))


@every_tuner
def test_only_adapter_weights_train(tuner):
    _, model, inputs = prepared(tuner)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    model.train()
    output_of(model, inputs).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    adapter = {name for name in before if ".lora_" in name or ".mora_" in name}
    assert changed == adapter
    assert len(trainable) == len(adapter)


@every_tuner
def test_the_checkpoint_holds_each_parameter_once_and_nothing_of_the_base(tuner, tmp_path):
    _, model, _ = prepared(tuner)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    parameters = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    norms = {key for key in saved if key.endswith(".lora_norm")}
    stamps = {key for key in saved if key.endswith((".lora_magnitude_vector", ".mora_stamp"))}
    assert saved.keys() - norms - stamps == parameters.keys()
    assert all(torch.equal(saved[name], p) for name, p in parameters.items())
    assert len(stamps) == len(tuner_layers(model))
    assert len(norms) == (28 if tuner.startswith(("reslora-input", "reslora-middle")) else 0)


@every_tuner
def test_saved_adapters_load_with_the_same_output(tuner, tmp_path):
    base, model, inputs = prepared(tuner)
    model.save_pretrained(tmp_path)
    expected = output_of(model, inputs)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.peft_config["default"])
    assert config.peft_type is PeftType(config.peft_type.value)
    for options in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        assert relative_error(output_of(loaded, inputs), expected) < MODEL64
        assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in PeftModel.from_pretrained(base, tmp_path, is_trainable=True).parameters())


@every_tuner
def test_auto_classes_load_the_adapter(tuner, tmp_path):
    base, _, inputs = prepared(tuner)
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base, config_of(tuner, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < MODEL64


@every_tuner
def test_merging_adds_the_delta_weights_and_unmerging_removes_them(tuner):
    base, model, inputs = prepared(tuner)
    expected = output_of(model, inputs)
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in tuner_layers(model).items()}
    deltas = {name: layer.get_delta_weight("default") for name, layer in tuner_layers(model).items()}
    model.merge_adapter()
    for name, layer in tuner_layers(model).items():
        assert relative_error(layer.get_base_layer().weight - weights[name], deltas[name]) < MODEL64
    merged = output_of(model, inputs)
    if tuner in MERGES_EXACTLY:
        assert relative_error(merged, expected) < MODEL64
    model.unmerge_adapter()
    for name, layer in tuner_layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, weights[name])
    assert relative_error(output_of(model, inputs), expected) < MODEL64

    plain = copy.deepcopy(model).merge_and_unload()
    assert type(plain) is type(base)
    assert not tuner_layers(plain)
    assert relative_error(output_of(plain, inputs), merged) < MODEL64
    assert torch.equal(output_of(model.unload(), inputs), output_of(base, inputs))


@every_tuner
def test_broken_adapters_are_not_merged_safely(tuner):
    _, model, _ = prepared(tuner)
    for broken in (float("nan"), float("inf")):
        for name, p in model.named_parameters():
            if "layers.1." in name and p.requires_grad:
                p.data[0] = broken
        message = r"^NaNs detected in the merged weights\. The adapter default seems to be broken$"  # PEFT's own
        with pytest.raises(ValueError, match=message):
            model.merge_and_unload(safe_merge=True)


@every_tuner
def test_disabling_gives_the_base_model(tuner):
    base, model, inputs = prepared(tuner)
    expected = output_of(model, inputs)
    with model.disable_adapter():
        assert torch.equal(output_of(model, inputs), output_of(base, inputs))
    assert torch.equal(output_of(model, inputs), expected)


SAME_FAMILY = [
    (a, b)
    for a in TUNERS
    for b in TUNERS
    if a.split("-")[0] == b.split("-")[0] and (a == b or "reslora-block" in (a, b) or {a, b} <= set(PLAIN))
]


@pytest.mark.quick(tuner=PLAIN, other=PLAIN)
@pytest.mark.parametrize(("tuner", "other"), SAME_FAMILY)
def test_adapters_can_be_added_switched_and_deleted(tuner, other):
    base, model, inputs = prepared(tuner)
    alone = randomize_adapters(
        get_peft_model(copy.deepcopy(base), config_of(other, r=2, target_modules=["q_proj", "down_proj"])), seed=7
    ).eval()
    first, second = output_of(model, inputs), output_of(alone, inputs)
    model.add_adapter("second", config_of(other, r=2, target_modules=["q_proj", "down_proj"]))
    set_peft_model_state_dict(model, get_peft_model_state_dict(alone), adapter_name="second")
    assert relative_error(output_of(model, inputs), first) < MODEL64
    model.set_adapter("second")
    assert relative_error(output_of(model, inputs), second) < MODEL64
    model.base_model.set_adapter(["default", "second"])
    both = output_of(model, inputs)
    assert min(relative_error(both, first), relative_error(both, second)) > 1e-3
    model.set_adapter("default")
    model.delete_adapter("second")
    assert relative_error(output_of(model, inputs), first) < MODEL64
    assert not any("second" in name for name in model.state_dict())


@every_tuner
def test_two_active_adapters_merge_to_the_sum(tuner):
    if tuner.endswith("-dora"):
        pytest.skip("the norm of one belongs to the sum with the other: see test_dora.py")
    base, model, _ = prepared(tuner)
    model.add_adapter("second", config_of(tuner, r=2, target_modules=["q_proj", "down_proj"]))
    randomize_adapters(model, seed=9)
    deltas = {
        name: sum(layer.get_delta_weight(a) for a in layer._get_available_adapters())
        for name, layer in tuner_layers(model).items()
    }
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    for name, delta in deltas.items():
        change = merged.get_submodule(name).weight - base.get_submodule(name).weight
        assert relative_error(change, delta) < MODEL64


@every_tuner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_stay_close(tuner, dtype):
    base, model, inputs = prepared(tuner)
    base, model = base.float(), model.float()
    tolerance = half_rounding(120, dtype)  # in each of four layers about 30 operations after each other
    expected = output_of(model, inputs)
    with torch.autocast("cpu", dtype):
        assert relative_error(output_of(model, inputs), expected) < tolerance
    half = adapted(base.to(dtype), config_of(tuner))
    assert relative_error(output_of(half, inputs), expected) < tolerance
    if tuner in MERGES_EXACTLY:
        assert relative_error(output_of(half.merge_and_unload(), inputs), expected) < tolerance


@also_quick
@every_tuner
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_keeps_the_gradient(tuner, use_reentrant):
    _, model, inputs = prepared(tuner)
    model.train()
    model.enable_input_require_grads()
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for candidate in (model, checkpointed):
        output_of(candidate, inputs).square().mean().backward()
    assert_gradients_close(gradients(checkpointed), gradients(model))


@every_tuner
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_on_their_own(tuner, duplicate):
    _, model, inputs = prepared(tuner)
    expected = output_of(model, inputs)
    twin = duplicate(model)
    for p in model.parameters():
        p.data.zero_()
    assert relative_error(output_of(twin, inputs), expected) < MODEL64


@every_tuner
def test_injection_without_a_tuner_around_it(tuner):
    """As diffusers and transformers do it."""
    base, model, inputs = prepared(tuner)
    injected = inject_adapter_in_model(config_of(tuner), copy.deepcopy(base)).eval()
    set_peft_model_state_dict(injected, get_peft_model_state_dict(model))
    assert relative_error(output_of(injected, inputs), output_of(model, inputs)) < MODEL64
    state = get_peft_model_state_dict(injected)
    assert {k.removeprefix("base_model.model.") for k in get_peft_model_state_dict(model)} == state.keys()


@every_tuner
def test_transformers_adds_and_loads_the_adapter(tuner, tmp_path):
    base, model, inputs = prepared(tuner)
    added = copy.deepcopy(base)
    added.add_adapter(config_of(tuner))
    randomize_adapters(added)
    added.eval()
    assert relative_error(output_of(added, inputs), output_of(model, inputs)) < MODEL64
    added.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert relative_error(output_of(base.eval(), inputs), output_of(model, inputs)) < MODEL64


@every_tuner
def test_fields_that_lora_users_know_work(tuner, tmp_path):
    bias = "mora_only" if tuner.startswith("mora") else "lora_only"
    fields = {
        "modules_to_save": ["lm_head"],
        "bias": bias,
        "layers_to_transform": [0, 1, 2],
        "exclude_modules": ["k_proj"],
        "rank_pattern": {} if "middle" in tuner or tuner.endswith("adalora") else {"q_proj": 2},
    }
    base, model, inputs = prepared(tuner, **fields)
    assert set(tuner_layers(model)) == {
        name
        for name, module in base.named_modules()
        if name.split(".")[-1] in set(TINY.targets) - {"k_proj"} and "layers.3" not in name
    }
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < MODEL64


@pytest.mark.quick(tuner=PLAIN)
@pytest.mark.parametrize("tuner", [name for name in TUNERS if name.startswith("reslora")])
def test_trainable_tokens_work(tuner, tmp_path):
    base, model, inputs = prepared(tuner, trainable_token_indices={"embed_tokens": [3, 5]})
    for name, p in model.named_parameters():
        if "trainable_tokens_delta" in name:
            p.data.add_(0.5)
    inputs["input_ids"][:, 1] = 3
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(output_of(loaded, inputs), output_of(model, inputs)) < MODEL64


@every_tuner
def test_peft_converts_it_to_lora_rightly(tuner):
    _, model, _ = prepared(tuner)
    _, state = convert_to_lora(model, rank=12)  # the smaller side of k_proj and v_proj
    for name, layer in tuner_layers(model).items():
        delta = layer.get_delta_weight("default")
        U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
        best = (U[:, :12] * S[:12]) @ Vh[:12]
        A, B = (state[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert relative_error(B @ A, best) < rounding(delta.numel())  # PEFT's SVD is in float32


WITHOUT_PLUGIN = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = Path(sys.argv[1])
for adapter in sys.argv[2:]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / adapter)
    torch.save(model(input_ids=torch.load(folder / "ids")).logits, folder / f"{adapter}.logits")
if "peft_reslora" in sys.modules:
    sys.exit("the plugin was imported")
"""


@pytest.mark.filterwarnings("ignore:The LoRA has r=:UserWarning", "ignore:The checkpoint is a DoRA:UserWarning")
def test_exports_load_where_the_plugin_is_not_imported(tmp_path):
    """One process for all tuners: the exported folder equals the merged model."""
    inputs = TINY.inputs()
    torch.save(inputs["input_ids"], tmp_path / "ids")
    TINY.make().save_pretrained(tmp_path / "base")
    expected = {}
    for tuner in TUNERS:
        _, model, _ = prepared(tuner, task_type="CAUSAL_LM")
        full_rank = tuner in ("mora-decoupling", "mora-rotation")
        options: dict[str, Any] = {"energy": 1.0} if full_rank else {"allow_dora": tuner.endswith("-dora")}
        if full_rank:
            with pytest.raises(ValueError, match=r"full rank.*merge_and_unload"):
                export_lora(model)
        save_as_lora(tmp_path / tuner, model, **options)
        expected[tuner] = output_of(model.merge_and_unload(), inputs)
    subprocess.run([sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path), *TUNERS], check=True, capture_output=True)
    bound = rounding(TINY.make(), torch.float32)  # that of the exported factors
    for tuner, logits in expected.items():
        assert relative_error(torch.load(tmp_path / f"{tuner}.logits"), logits) < bound
