"""Saved pipelines of diffusers: what is encoded, trained and drawn is what the pipeline itself encodes and draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import relative_error
from helpers.tiny_images import SIDE, tiny_image_run, write_tiles
from helpers.tolerances import MODEL64, rounding
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_reslora import ResLoRAConfig, describe_chains
from peft_reslora.experiments import train
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.dry_run import describe_run
from peft_reslora.experiments.run import train_with
from peft_reslora.experiments.settings import DataSettings, ImageSettings, train_settings
from peft_reslora.experiments.tasks import make_task
from peft_reslora_cli.config_files import find_config

diffusers = pytest.importorskip("diffusers")

from helpers.tiny_pipelines import save_pipeline  # noqa: E402

from peft_reslora.experiments.denoising import held_out_rows, noisy_row, stacked  # noqa: E402
from peft_reslora.experiments.image_base import generated, load_pipeline, starting_noise  # noqa: E402
from peft_reslora.experiments.image_schedules import Flow  # noqa: E402

KINDS = ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"]
PARTS = {"StableDiffusion3Pipeline": "transformer"}
CAPTIONS = ["red tile", "a blue square"]
SETTINGS = DataSettings(max_length=77, images=ImageSettings(size=SIDE, sampling_steps=3, guidance=2.5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_pipeline(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles"))


def pipeline_of(kind: str, folder: Path) -> Any:
    """diffusers' own; of those that were trained with DDPM, with DDIM's steps."""
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if kind != "StableDiffusion3Pipeline":
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return pipeline


def model_of(pipeline: Any) -> Any:
    return pipeline.transformer if getattr(pipeline, "transformer", None) is not None else pipeline.unet


def longest(pipeline: Any) -> dict[str, int]:
    return {"max_sequence_length": 77} if hasattr(pipeline, "transformer") else {}


# Captions


def encoded_by(kind: str, pipeline: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """What the pipeline makes of the captions, and without one."""
    given = (CAPTIONS, "cpu", 1, True)
    if kind == "StableDiffusionPipeline":
        states, empty = pipeline.encode_prompt(*given)
        return {"encoder_hidden_states": (states, empty)}
    prompts = {"prompt_2": None} | ({"prompt_3": None} if kind == "StableDiffusion3Pipeline" else {})
    found = pipeline.encode_prompt(CAPTIONS, **prompts, device="cpu", **longest(pipeline))
    pooled = "pooled_projections" if kind == "StableDiffusion3Pipeline" else "text_embeds"
    return {"encoder_hidden_states": found[:2], pooled: found[2:]}


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_encoded_as_the_pipeline_does(kind: str, saved: dict[str, Path]) -> None:
    base, pipeline = load_pipeline(str(saved[kind]), "float32"), pipeline_of(kind, saved[kind])
    with torch.no_grad():
        expected = encoded_by(kind, pipeline)
        told, empty = base.captions(CAPTIONS, SETTINGS), base.captions.unconditional(SETTINGS)
    sizes = {"time_ids"} if kind == "StableDiffusionXLPipeline" else set()
    assert set(told) == set(empty) == set(expected) | sizes
    tolerance = sum(rounding(encoder.model) for encoder in base.captions.encoders)
    for name, (wanted, without) in expected.items():
        assert relative_error(told[name], wanted) < tolerance
        # The whole of it: of SDXL without a caption, nothing but zeros.
        assert torch.allclose(empty[name].expand_as(without), without, atol=tolerance * float(wanted.abs().max()))
    for name in sizes:
        assert told[name].tolist() == 2 * [[SIDE, SIDE, 0, 0, SIDE, SIDE]]


def test_t5_reads_longer_captions_than_the_clips_beside_it(saved: dict[str, Path]) -> None:
    kind = "StableDiffusion3Pipeline"
    base, pipeline = load_pipeline(str(saved[kind]), "float32"), pipeline_of(kind, saved[kind])
    captions = ["red tile " * 90]
    with torch.no_grad():
        found = base.captions(captions, replace(SETTINGS, max_length=100))["encoder_hidden_states"]
        expected = pipeline.encode_prompt(captions, None, None, max_sequence_length=100)[0]
    assert found.shape[1] == 77 + 100
    assert relative_error(found, expected) < sum(rounding(encoder.model) for encoder in base.captions.encoders)


def test_without_a_caption_sdxl_reads_an_empty_one_if_its_pipeline_says_so(saved: dict[str, Path]) -> None:
    base = load_pipeline(str(saved["StableDiffusionXLPipeline"]), "float32")
    zeros, empty = base.captions.unconditional(SETTINGS), base.captions([""], SETTINGS)
    assert not zeros["text_embeds"].any()
    base.captions.pipeline = {"force_zeros_for_empty_prompt": False}
    found = base.captions.unconditional(SETTINGS)
    assert all(torch.equal(found[name], empty[name]) for name in empty)
    assert empty["text_embeds"].all()


# Noise and loss


def test_a_row_of_a_flow_is_the_papers_line_from_image_to_noise() -> None:
    """z = (1 - t) x + t e with the target e - x; levels are shifted as t = 3 u / (1 + 2 u) with u evenly spaced."""
    schedule = Flow(diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=50, shift=3.0))
    image = torch.randn(4, 5, 7)
    row = noisy_row(schedule, image, {}, seed=3, level=30)
    noise = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(3)).double()
    even = (50 - 30) / 50
    time = 3 * even / (1 + 2 * even)
    eps = torch.finfo(torch.float32).eps
    assert relative_error(row["sample"], (1 - time) * image.double() + time * noise) < 8 * eps
    assert relative_error(row["labels"], noise - image.double()) < 2 * eps
    assert float(row["timestep"]) == pytest.approx(50 * time, rel=8 * eps)


def test_levels_of_a_flow_are_drawn_by_the_logit_normal_density() -> None:
    """Mean 0 and deviation 1 of the logits, each within four of its own standard errors."""
    schedule, count = Flow(diffusers.FlowMatchEulerDiscreteScheduler()), 4000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([schedule.draw(generator) for _ in range(count)])
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 1000
    logits = torch.logit((drawn.double() + 0.5) / 1000)
    assert abs(float(logits.mean())) < 4 / count**0.5
    assert abs(float(logits.std()) - 1) < 4 / (2 * count) ** 0.5


def test_a_shift_that_depends_on_the_size_is_refused(tmp_path: Path) -> None:
    save_pipeline(tmp_path, "StableDiffusion3Pipeline", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="use_dynamic_shifting=true; a fixed shift is known"):
        load_pipeline(str(tmp_path), "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_pipelines_own_model(kind: str, saved: dict[str, Path]) -> None:
    base, plain = load_pipeline(str(saved[kind]), "float32"), model_of(pipeline_of(kind, saved[kind]))
    told = base.captions(CAPTIONS, SETTINGS)
    batch = stacked(held_out_rows(base.schedule, torch.randn(2, 4, 4, 4), told, timesteps=3))
    given = {"timestep": batch["timestep"], "encoder_hidden_states": batch["encoder_hidden_states"]}
    if kind == "StableDiffusion3Pipeline":
        given |= {"hidden_states": batch["sample"], "pooled_projections": batch["pooled_projections"]}
    else:
        given["sample"] = batch["sample"]
    if kind == "StableDiffusionXLPipeline":
        given["added_cond_kwargs"] = {name: batch[name] for name in ("text_embeds", "time_ids")}
    with torch.no_grad():
        expected, found = plain(**given).sample, base.model(**batch)
        without_labels = base.model(**{name: value for name, value in batch.items() if name != "labels"})
    assert torch.equal(found.sample, expected)
    assert torch.equal(without_labels.sample, expected)
    wanted = (expected.double() - batch["labels"].double()).square().mean()
    assert relative_error(found.loss, wanted) < rounding(plain)


# Drawing


def draw_by(pipeline: Any, noise: Tensor, **given: Any) -> Tensor:
    """Images from -1 to 1, from this noise."""
    images = SETTINGS.images
    assert images is not None
    found = pipeline(
        CAPTIONS,
        height=SIDE,
        width=SIDE,
        num_inference_steps=images.sampling_steps,
        guidance_scale=images.guidance,
        latents=noise.clone(),
        output_type="pt",
        **longest(pipeline),
        **given,
    ).images
    return 2 * found - 1


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_drawn_as_the_pipeline_draws_them(kind: str, saved: dict[str, Path]) -> None:
    """In float64, but for the steps of a flow, which diffusers rounds to float32."""
    images = SETTINGS.images
    assert images is not None
    base, pipeline = load_pipeline(str(saved[kind]), "float64"), pipeline_of(kind, saved[kind]).to(torch.float64)
    for part in (base.vae, *(encoder.model for encoder in base.captions.encoders)):
        part.double()
    expected = draw_by(pipeline, starting_noise(base, images, range(2)).double())
    with torch.no_grad():
        told, empty = base.captions(CAPTIONS, SETTINGS), base.captions.unconditional(SETTINGS)
    found = generated(base.model, base, told, empty, images)
    assert found.shape == (2, 3, SIDE, SIDE)
    # Each step adds what separates two calls of the model, as far apart as the guidance moves them.
    tolerance = images.sampling_steps * (2 * images.guidance + 1) * MODEL64
    assert relative_error(found, expected) < tolerance
    # It would be seen if one thing only were another: a step more, no guidance, the captions exchanged.
    others = [replace(images, sampling_steps=4), replace(images, guidance=1.0)]
    drawn = [generated(base.model, base, told, empty, other) for other in others]
    drawn.append(generated(base.model, base, {name: value.flip(0) for name, value in told.items()}, empty, images))
    assert all(relative_error(other, expected) > 100 * tolerance for other in drawn)


# Runs


def image_run(tiles: Path, output: Path, pipeline: Path, **tuner: Any) -> dict[str, Any]:
    settings = tiny_image_run(tiles, output)
    settings["base"] = {"name": str(pipeline)}
    settings["data"]["max_length"] = 77
    settings["tuner"] |= {"shortcut": "block", **tuner}
    return settings


CONFIGS = {
    "sd15-reslora": ("StableDiffusionPipeline", {}),
    "sd2-reslora": ("StableDiffusionPipeline", {"prediction_type": "v_prediction"}),
    "sdxl-reslora": ("StableDiffusionXLPipeline", {}),
    "sd35-medium-reslora": ("StableDiffusion3Pipeline", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_of_a_pipeline_trains_a_saved_one(config: str, tiles: Path, tmp_path: Path) -> None:
    """With everything as it is shipped but the sizes and the data, which are those of a test."""
    kind, scheduler = CONFIGS[config]
    pipeline = save_pipeline(tmp_path / "pipeline", kind, **scheduler)
    rows = "data.validation_rows=2", "data.test_rows=2", "data.text=[caption]", f"data.folder={tiles}"
    images = "data.images.sheet=sheet.png", "data.images.column=index", f"data.images.size={SIDE}"
    dear = "data.images.samples=2", "data.images.shown=2", "data.images.sampling_steps=2", "training.max_steps=2"
    read = read_config(
        find_config(config),
        [f"base.name={pipeline}", "data.files={train: captions.csv}", *rows, *images, *dear, "training.use_cpu=true",
         "merge=true", f"output_dir={tmp_path / 'run'}"],
    )  # fmt: skip
    said = describe_run(train_settings(read))
    assert "tuner: RESLORA" in said
    assert " links" in said
    metrics = train_with(train_settings(read))
    assert metrics["steps"] == 2
    assert metrics["before_merge"]["test"]["denoising_loss"] > 0
    assert metrics["export"]["exact"]
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["base_model_name_or_path"] == str(pipeline)
    plain = model_of(pipeline_of(kind, pipeline))
    merged, found = type(plain).from_pretrained(tmp_path / "run" / "merged", output_loading_info=True)
    assert not any(found.values())
    assert merged.state_dict().keys() == plain.state_dict().keys()


def trained_apart(model: nn.Module) -> None:
    """Give an adapter that has just begun an effect that is seen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_export_of_a_pipelines_adapter_loads_in_diffusers(
    kind: str, saved: dict[str, Path], tiles: Path, tmp_path: Path
) -> None:
    """The file of a run, read by `load_lora_weights`, draws with diffusers' pipeline what the adapter draws."""
    images = SETTINGS.images
    assert images is not None
    train(image_run(tiles, tmp_path / "run", saved[kind]), "training.learning_rate=0.05")
    base, pipeline = load_pipeline(str(saved[kind]), "float32"), pipeline_of(kind, saved[kind])
    noise = starting_noise(base, images, range(2))
    before = draw_by(pipeline, noise)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    after = draw_by(pipeline, noise)
    own = PeftModel.from_pretrained(base.model, tmp_path / "run" / "adapter")
    with torch.no_grad():
        told, empty = base.captions(CAPTIONS, SETTINGS), base.captions.unconditional(SETTINGS)
    found = generated(own, base, told, empty, images)
    steps = images.sampling_steps * (2 * images.guidance + 1)
    tolerance = steps * (rounding(own) + rounding(base.vae))
    assert relative_error(found, after) < tolerance
    assert relative_error(found, before) > tolerance


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
def test_chains_of_a_transformer_run_through_all_blocks(shortcut: str, saved: dict[str, Path]) -> None:
    """Stable Diffusion 3: eight roles of the joint attention, of which one ends with the last block but one."""
    base = load_pipeline(str(saved["StableDiffusion3Pipeline"]), "float32")
    settings = train_settings(read_config(find_config("sd35-medium-reslora")))
    config = ResLoRAConfig(r=2, target_modules=settings.tuner["target_modules"], shortcut=shortcut)
    table = str(describe_chains(base.model, config))
    assert "23 layers in 8 chains, 15 links" in table
    model = get_peft_model(base.model, config)
    trained_apart(model)
    told = base.captions(CAPTIONS, SETTINGS)
    batch = stacked(held_out_rows(base.schedule, torch.randn(2, 4, 4, 4), told, timesteps=2))
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.equal(model(**batch).loss, loss)


@pytest.mark.slow
def test_what_the_comments_of_the_configs_say_is_linked_in_the_large_models() -> None:
    """With the sizes of Stable Diffusion XL and 3.5 Medium: links within one resolution, and from block to block."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
        )
        transformer = diffusers.SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    tables = []
    for model, name in ((unet, "sdxl-reslora"), (transformer, "sd35-medium-reslora")):
        settings = train_settings(read_config(find_config(name)))
        tables.append(str(describe_chains(model, ResLoRAConfig(target_modules=settings.tuner["target_modules"]))))
    # Eight layers a transformer block; four chains down and up by width, and one in the middle.
    assert "560 layers in 40 chains, 520 links" in tables[0]
    lengths = {line.split()[1] for line in tables[0].partition("links not made:")[0].splitlines()[3:]}
    assert lengths == {"4", "20", "30", "6", "10"}
    assert "191 layers in 8 chains, 183 links" in tables[1]


def test_other_pipelines_are_refused_by_their_name(tiles: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}), encoding="utf-8")
    settings = train_settings(from_mapping(image_run(tiles, tmp_path / "run", tmp_path / "other")))
    known = "the unet of StableDiffusionXLPipeline, the transformer of StableDiffusion3Pipeline"
    for refused in (make_task, describe_run):
        with pytest.raises(ValueError, match=f"is a FluxPipeline; text_to_image trains .*{known}"):
            refused(settings)
