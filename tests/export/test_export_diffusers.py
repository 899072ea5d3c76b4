"""Exports for diffusers: the folder in its single models and in its pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.oracle import randomize_adapters, relative_error
from helpers.tolerances import rounding
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.export import export_lora, save_as_lora, save_for_pipeline

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


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert relative_error(actual, expected) < rounding(unet())


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    model = adapted(unet(), LoHaConfig(r=2, alpha=3, **CONFIG))
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
    randomize_adapters(model)
    export = save_as_lora(tmp_path / "lora", model)
    assert export.config.target_modules == {"to_q", "to_v", "to_out.0"}
    assert export.diffusers_prefix == "unet"
    assert_same(outputs(PeftModel.from_pretrained(unet(), tmp_path / "lora").eval()), outputs(model))


# Text encoders, and several models of one pipeline


def text_encoder(projection: bool = False) -> torch.nn.Module:
    torch.manual_seed(2)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=28,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=31,
        max_position_embeddings=12,
        initializer_range=0.3,
        eos_token_id=30,
        bos_token_id=29,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def encoded(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(18).reshape(2, 9)).last_hidden_state


def pipeline(**models: torch.nn.Module) -> object:
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        **{**none, **models}, scheduler=diffusers.DDIMScheduler(), requires_safety_checker=False
    )


def assert_same_effect(actual: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> None:
    assert relative_error(expected, base) > 1e-2
    assert relative_error(actual - base, expected - base) < 1e-4


TUNERS = {
    "block": lambda: ResLoRAConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"], shortcut="block"),
    "mora": lambda: MoRAConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"], mora_type="sharing"),
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_text_encoder_loads_in_a_pipeline(tuner: str, tmp_path: Path) -> None:
    model = get_peft_model(text_encoder(), TUNERS[tuner]()).eval()
    randomize_adapters(model)
    export = save_as_lora(tmp_path / "lora", model, base_model=text_encoder())
    loaded = pipeline(unet=unet(), text_encoder=text_encoder())
    loaded.load_lora_weights(tmp_path / "lora")
    assert_same_effect(encoded(loaded.text_encoder), encoded(model), encoded(text_encoder()))
    assert export.diffusers_prefix.split(".")[0] == "text_encoder"
    plain = PeftModel.from_pretrained(text_encoder(), tmp_path / "lora").eval()
    assert_same_effect(encoded(plain), encoded(model), encoded(text_encoder()))


def test_unet_and_text_encoder_load_from_one_file(tmp_path: Path) -> None:
    encoder = get_peft_model(text_encoder(), TUNERS["block"]()).eval()
    model = get_peft_model(unet(), ResLoRAConfig(r=3, shortcut="block", **CONFIG)).eval()
    randomize_adapters(encoder)
    randomize_adapters(model)
    exports = {"unet": export_lora(model), "text_encoder": export_lora(encoder)}
    save_for_pipeline(tmp_path / "lora", exports)
    loaded = pipeline(unet=unet(), text_encoder=text_encoder())
    loaded.load_lora_weights(tmp_path / "lora")
    assert_same_effect(encoded(loaded.text_encoder), encoded(encoder), encoded(text_encoder()))
    assert_same_effect(outputs(loaded.unet), outputs(model), outputs(unet()))
    assert sorted(file.name for file in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "pytorch_lora_weights.safetensors",
    ]
    assert "ResLoRA (block) with" in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="new or an empty folder"):
        save_for_pipeline(tmp_path / "lora", exports)


def test_the_second_text_encoder_of_sdxl_has_its_own_name(tmp_path: Path) -> None:
    encoders = [get_peft_model(text_encoder(projection), TUNERS["mora"]()).eval() for projection in (False, True)]
    for model in encoders:
        randomize_adapters(model)
    first, second = map(export_lora, encoders)
    assert second.diffusers_prefix.split(".")[0] == "text_encoder_2"
    save_for_pipeline(tmp_path / "lora", {"text_encoder": first, "text_encoder_2": second})
    loaded = diffusers.StableDiffusionXLPipeline(
        **dict.fromkeys(("vae", "tokenizer", "tokenizer_2")),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True),
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(),
        add_watermarker=False,
    )
    loaded.load_lora_weights(tmp_path / "lora")
    for actual, expected, projection in zip(
        (loaded.text_encoder, loaded.text_encoder_2), encoders, (False, True), strict=True
    ):
        assert_same_effect(encoded(actual), encoded(expected), encoded(text_encoder(projection)))


def test_exports_under_the_name_of_another_model_are_refused(tmp_path: Path) -> None:
    export = export_lora(get_peft_model(unet(), LoraConfig(r=2, **CONFIG)))
    for components in ({"text_encoder": export}, {}, {"transformer": export}):
        with pytest.raises(ValueError, match=r"pipelines hold as unet|nothing to write"):
            save_for_pipeline(tmp_path / "lora", components)
    assert not list(tmp_path.iterdir())


# Diffusers' own ways to save


@pytest.mark.parametrize("tuner", TUNERS)
def test_savers_of_plain_lora_are_refused_before_they_write(tuner: str, tmp_path: Path) -> None:
    model, config = unet(), TUNERS[tuner]()
    config.target_modules = set(CONFIG["target_modules"])
    model.add_adapter(config)
    randomize_adapters(model)
    with pytest.raises(ValueError, match=r"save_lora_adapter.*save_as_lora"):
        model.save_lora_adapter(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"_collate_lora_metadata.*save_as_lora"):
        diffusers.training_utils._collate_lora_metadata({"unet": model})
    assert not list(tmp_path.iterdir())
    save_as_lora(tmp_path / "lora", model)  # the way that the message names
    loaded = unet()
    loaded.load_lora_adapter(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    assert_same_effect(outputs(loaded), outputs(model), outputs(unet()))
    config.save_pretrained(tmp_path / "native")
    assert config.to_dict()["peft_type"] == config.peft_type


def test_saving_a_plain_lora_is_left_alone(tmp_path: Path) -> None:
    model = unet()
    model.add_adapter(LoraConfig(r=2, **CONFIG))
    model.save_lora_adapter(tmp_path)
    loaded = unet()
    loaded.load_lora_adapter(tmp_path, weight_name="pytorch_lora_weights.safetensors", prefix=None)
    assert list(loaded.peft_config)
