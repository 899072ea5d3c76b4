"""A load that is refused leaves the model as it was, and a layer that got nothing does not pass for a loaded one."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import randomize_adapters
from helpers.tiny_models import TINY_MODELS, output_of
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig, export_lora

TINY = TINY_MODELS["llama"]
INPUTS = {"input_ids": torch.arange(1, 15).view(2, 7)}
WEIGHTS = "adapter_model.safetensors"
TUNERS = ["input", "block", "mora"]
LACKING = "layers.1.self_attn.q_proj"


def config_of(tuner: str, **fields: Any) -> Any:
    fields = {"r": 3, "target_modules": ["q_proj", "v_proj"], **fields}
    if tuner == "mora":
        return MoRAConfig(**fields, mora_type="sharing")
    return ResLoRAConfig(**fields, shortcut=tuner, merge_estimator="drop")


def adapted(tuner: str, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return randomize_adapters(get_peft_model(TINY.make(), config_of(tuner, **fields))).eval()


def without(folder: Path, part: str) -> None:
    """Take entries away, and the seal of the file."""
    tensors = {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if part not in key}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def state_of(model: PeftModel) -> tuple[Any, ...]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return tensors, flags, list(model.peft_config), model.active_adapter, [type(m) for m in model.modules()]


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_a_refused_adapter_is_taken_away_again(tuner: str, trainable: bool, tmp_path: Path) -> None:
    """PEFT leaves the copies of whole modules, as `delete_adapter` does, without a copy in them."""
    adapted(tuner, modules_to_save=["lm_head"] if trainable else None).save_pretrained(tmp_path)
    without(tmp_path, LACKING)
    model = adapted(tuner)
    expected, before = output_of(model, INPUTS), state_of(model)
    with pytest.raises(ValueError, match="does not fit adapter 'other' on this model"):
        model.load_adapter(tmp_path, "other", is_trainable=trainable)
    now = state_of(model)
    assert now[2:4] == before[2:4]
    assert {key.replace("original_module.", "") for key in now[0]} == before[0].keys()
    assert {name.replace("original_module.", ""): flag for name, flag in now[1].items()} == before[1]
    assert torch.equal(output_of(model, INPUTS), expected)
    model.save_pretrained(tmp_path / "again")
    model.load_adapter(tmp_path / "again", "other")  # the name is free
    model.set_adapter("other")
    assert torch.equal(output_of(model, INPUTS), expected)


def test_a_refused_adapter_is_taken_away_behind_a_function_of_another_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ms-swift puts one before PEFT's `load_adapter`."""
    original = PeftModel.load_adapter

    def load_adapter(self: PeftModel, model_id: str, *args: Any, **kwargs: Any) -> Any:
        return original(self, model_id, *args, **kwargs)

    adapted("block").save_pretrained(tmp_path)
    without(tmp_path, LACKING)
    model = adapted("block")
    monkeypatch.setattr(PeftModel, "load_adapter", load_adapter)
    with pytest.raises(ValueError, match="does not fit adapter 'other' on this model"):
        model.load_adapter(str(tmp_path), "other")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_an_adapter_that_was_there_before_stays(tuner: str, tmp_path: Path) -> None:
    """Whoever made it, also if nothing has been loaded into it yet."""
    adapted(tuner).save_pretrained(tmp_path)
    without(tmp_path, LACKING)
    model = adapted(tuner)
    model.add_adapter("made", config_of(tuner))
    expected, tensors = output_of(model, INPUTS), load_file(tmp_path / WEIGHTS)
    for load in (
        lambda name: model.load_adapter(tmp_path, name),
        lambda name: set_peft_model_state_dict(model, tensors, name),
    ):
        for name in ("default", "made"):
            before = state_of(model)
            with pytest.raises(ValueError, match="does not fit"):
                load(name)
            tensors_now, *others = state_of(model)
            assert others == list(before[1:])
            assert all(torch.equal(tensor, before[0][key]) for key, tensor in tensors_now.items())
    assert torch.equal(output_of(model, INPUTS), expected)
    injected = inject_adapter_in_model(config_of(tuner), TINY.make())
    with pytest.raises(ValueError, match="does not fit"):
        set_peft_model_state_dict(injected, tensors)
    assert list(injected.peft_config) == ["default"]


def loaded_without_a_layer(tuner: str, folder: Path) -> nn.Module:
    adapted(tuner).save_pretrained(folder)
    without(folder, LACKING)
    base = TINY.make()
    base.load_adapter(str(folder))
    return base.eval()


USES = {
    "a forward pass": lambda model: output_of(model, INPUTS),
    "a compiled one": lambda model: output_of(torch.compile(model, backend="eager", fullgraph=True), INPUTS),
    "an export": export_lora,
    "saving": get_peft_model_state_dict,
    "a copy": lambda model: output_of(copy.deepcopy(model), INPUTS),
    "a pickle": lambda model: output_of(pickle.loads(pickle.dumps(model)), INPUTS),
}


@pytest.mark.quick(tuner=["input"])
@pytest.mark.quick(use=["a forward pass"])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_a_layer_that_transformers_loads_nothing_into_is_not_used(tuner: str, use: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = loaded_without_a_layer(tuner, tmp_path)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(
            Exception, match=r"'default' into layer '.*' cannot be used: .*layers\.1\.self_attn\.q_proj"
        ):
            USES[use](model)
    torch._dynamo.reset()


@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_adapters_without_any_stamp_are_used(tuner: str, tmp_path: Path) -> None:
    """As of 0.1.0, or where somebody has left the stamps out on purpose."""
    model = adapted(tuner)
    model.save_pretrained(tmp_path)
    without(tmp_path, "mora_stamp" if tuner == "mora" else "lora_magnitude_vector")
    base = TINY.make()
    base.load_adapter(str(tmp_path))
    torch.testing.assert_close(output_of(base.eval(), INPUTS), output_of(model, INPUTS))


@pytest.mark.parametrize("tuner", TUNERS)
@torch.no_grad()
def test_adapters_do_not_answer_for_each_other(tuner: str, tmp_path: Path) -> None:
    """A new adapter made with the config of a saved one has no stamps, beside the saved one that has."""
    model = adapted(tuner)
    model.save_pretrained(tmp_path)
    base = TINY.make()
    base.load_adapter(str(tmp_path), adapter_name="saved")
    base.add_adapter(base.peft_config["saved"], adapter_name="new")
    base.set_adapter(["saved", "new"])
    torch.testing.assert_close(output_of(base.eval(), INPUTS), output_of(model, INPUTS))


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_deleted_adapter_is_in_no_dictionary(tuner: str) -> None:
    """As PEFT's own suite asks of all tuners."""
    model = adapted(tuner)
    model.add_adapter("other", model.peft_config["default"])
    model.delete_adapter("other")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            assert [name for name, held in vars(layer).items() if isinstance(held, dict) and "other" in held] == []
