"""Exports for diffusers: the folder in its single models and in its pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from tolerances import rounding

from peft_reslora.export import save_as_lora

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:The LoRA has r=", "ignore::FutureWarning")
CONFIG = {"target_modules": ["to_q", "to_v", "to_out.0"]}


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


def outputs(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    sample, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 5, 12)))
    with torch.no_grad():
        return model(sample, torch.tensor([7]), encoder_hidden_states=context).sample


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            for name, parameter in layer.named_parameters():
                if "base_layer" not in name:
                    parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((actual - expected).norm() / expected.norm()) < rounding(unet())


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    model = get_peft_model(unet(), LoHaConfig(r=2, alpha=3, **CONFIG)).eval()
    randomise(model)
    save_as_lora(tmp_path / "lora", model, base_model=unet())
    assert float((outputs(unet()) - outputs(model)).norm()) > 1e-2
    return tmp_path / "lora", outputs(model)


def test_the_folder_loads_in_plain_peft(exported: tuple[Path, torch.Tensor]) -> None:
    folder, expected = exported
    assert_same(outputs(PeftModel.from_pretrained(unet(), folder).eval()), expected)


def test_the_folder_loads_in_a_single_model(exported: tuple[Path, torch.Tensor]) -> None:
    folder, expected = exported
    model = unet()
    model.load_lora_adapter(folder, weight_name="adapter_model.safetensors", prefix="base_model.model")
    assert_same(outputs(model), expected)


def test_the_folder_loads_in_a_pipeline(exported: tuple[Path, torch.Tensor]) -> None:
    folder, expected = exported
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(folder)
    assert_same(outputs(pipeline.unet), expected)


def test_the_pipelines_file_has_its_names_and_no_metadata(exported: tuple[Path, torch.Tensor]) -> None:
    folder, _ = exported
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert all(name.startswith("unet.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(name.replace("unet.", "base_model.model.", 1) for name in names)


def test_an_adapter_added_by_diffusers_is_exported(tmp_path: Path) -> None:
    model = unet()
    model.add_adapter(LoraConfig(r=3, **CONFIG))
    randomise(model)
    export = save_as_lora(tmp_path / "lora", model)
    assert export.config.target_modules == {"to_q", "to_v", "to_out.0"}
    assert export.diffusers_prefix == "unet"
    assert_same(outputs(PeftModel.from_pretrained(unet(), tmp_path / "lora").eval()), outputs(model))
