"""Text to image: what is decoded and refused, that noise is the same for all, and what is measured and drawn."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.oracle import relative_error
from helpers.tiny_images import SIDE, color_of, tiny_image_comparison, tiny_image_run, write_tiles
from helpers.tolerances import rounding
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import TrainerCallback

from peft_reslora import ResLoRAConfig, describe_chains
from peft_reslora.experiments import compare, comparison, train
from peft_reslora.experiments.compare_settings import compare_settings
from peft_reslora.experiments.config_file import from_mapping, read_config
from peft_reslora.experiments.data import Split, with_image_files
from peft_reslora.experiments.dry_run import describe_run
from peft_reslora.experiments.images import all_pixels
from peft_reslora.experiments.lines import read_lines
from peft_reslora.experiments.settings import DataSettings, ImageSettings, TrainSettings, train_settings
from peft_reslora.experiments.statistics import paired_difference
from peft_reslora.experiments.task import Task
from peft_reslora.experiments.tasks import make_task
from peft_reslora_cli.config_files import find_config

diffusers = pytest.importorskip("diffusers")

from peft_reslora.experiments import image_pretraining  # noqa: E402
from peft_reslora.experiments.denoising import NoisyRows, held_out_rows, noisy_row  # noqa: E402
from peft_reslora.experiments.image_metrics import FixedEncoder, drift, similarity  # noqa: E402
from peft_reslora.experiments.image_schedules import Diffusion  # noqa: E402
from peft_reslora.experiments.image_task import load_image_base  # noqa: E402


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(autouse=True)
def cache(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(tiles / "cache"))


def settings_of(tiles: Path, *overrides: str) -> TrainSettings:
    return train_settings(from_mapping(tiny_image_run(tiles, tiles / "run"), overrides))


@pytest.fixture
def task(tiles: Path) -> Task:
    return make_task(settings_of(tiles))


# Images


def test_each_caption_has_its_tile_and_its_family(tiles: Path) -> None:
    settings = settings_of(tiles)
    data = make_task(settings).data
    assert data.sizes() == {"train": 9, "validation": 3, "test": 4}
    for split in data.splits.values():
        assert {row["category"] for row in split.rows} == {"warm"}
        for row, image in zip(split.rows, all_pixels(split, settings.data), strict=True):
            expected = torch.tensor(color_of(row["caption"])) / 127.5 - 1
            assert torch.allclose(image, expected[:, None, None].expand(3, SIDE, SIDE), atol=1e-6)


def png(color: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def test_images_are_files_beside_their_list_or_bytes_of_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png((255, 0, 0), (20, 12)))
    settings = DataSettings(images=ImageSettings(size=6))
    values: list[Any] = [
        "red.png",
        {"bytes": png((255, 0, 0), (6, 30)), "path": None},
        Image.new("RGB", (6, 6), "red"),
    ]
    split = Split(str(tmp_path / "list.csv"), [{"image": value} for value in values], [1, 2, 3])
    expected = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(3, 3, 6, 6)
    assert torch.equal(all_pixels(split, settings), expected)


def test_an_image_is_cut_to_the_square_around_its_center(tmp_path: Path) -> None:
    picture = np.zeros((4, 10, 3), dtype=np.uint8)
    picture[:, 3:7] = 255
    Image.fromarray(picture).save(tmp_path / "bar.png")
    split = Split(str(tmp_path / "list.csv"), [{"image": "bar.png"}], [1])
    assert torch.equal(all_pixels(split, DataSettings(images=ImageSettings(size=4))), torch.ones(1, 3, 4, 4))


def test_a_data_set_gives_the_bytes_of_its_images() -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = {"image": [{"bytes": b"no image", "path": None}], "text": ["a"]}
    features = Features({"image": ImageFeature(), "text": Value("string")})
    (row,) = with_image_files(Dataset.from_dict(rows, features=features))
    assert row["image"]["bytes"] == b"no image"
    with pytest.raises(ValueError, match="hub, row 7, column 'image': no image"):
        all_pixels(Split("hub", [row], [7]), DataSettings(images=ImageSettings()))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.images.family=hot"], r"captions.csv, column 'category': .*family='hot' .* there are cold, warm"),
        (["data.images.family_column=kind"], r"captions.csv, row 1, column 'kind': no such column"),
        (["data.images.column=picture"], r"captions.csv, row 1, column 'picture': no such column"),
        (["data.images.column=caption"], r"captions.csv, row \d+, column 'caption': no image"),
        (["data.images.sheet=nothing.png"], r"captions.csv, row \d+, column 'index': no image .*nothing.png"),
        (["data.images.size=16"], r"captions.csv, row \d+, column 'index': no image \(tile \d+ of a sheet with 8"),
        (["data.validation_rows=16"], r"validation_rows=16 and test_rows=\d+ leave none of its 16 rows to train"),
    ],
)
def test_damaged_data_are_refused_before_anything_is_loaded(tiles: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_task(settings_of(tiles, "base.pretrain.steps=1000000", *overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["task=classification"], "task=classification has no use for data.images"),
        (["data.images=null"], "task=text_to_image needs data.images"),
        (["data.images.draws=0"], "data.images.draws=0 must be positive"),
        (["base.pretrain=null"], "text_to_image needs base.name, or config=unet with pretrain"),
        (["data.images.family=null"], "data.images.family is missing"),
        (["base.text_encoder.hiden_size=8"], "Did you mean 'hidden_size'"),
        (["base.block_out_chanels=[8]"], "Did you mean 'block_out_channels'"),
    ],
)
def test_settings_that_cannot_be_right_are_refused(tiles: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        settings_of(tiles, *overrides)


# Noise and loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_noisy_row_is_the_papers_mixture(kind: str) -> None:
    """x_t = sqrt(a) x + sqrt(1 - a) e, and v = sqrt(a) e - sqrt(1 - a) x; a is the product of 1 - beta."""
    schedule = Diffusion(diffusers.DDPMScheduler(prediction_type=kind, num_train_timesteps=50))
    image = torch.randn(3, 5, 7)
    row = noisy_row(schedule, image, {}, seed=3, level=30)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), 0)[30]
    noise = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(3)).double()
    target = noise if kind == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * image.double()
    tolerance = 64 * torch.finfo(torch.float32).eps  # of the schedule's product of 31 factors in float32
    assert relative_error(row["sample"], alpha.sqrt() * image.double() + (1 - alpha).sqrt() * noise) < tolerance
    assert relative_error(row["labels"], target) < tolerance
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        Diffusion(diffusers.DDPMScheduler(prediction_type="sample"))


def test_rows_are_all_images_under_each_noise_and_the_same_every_time() -> None:
    schedule, images = Diffusion(diffusers.DDPMScheduler()), torch.randn(3, 1, 2, 2)
    rows = NoisyRows(schedule, images, {"encoder_hidden_states": torch.arange(3.0)[:, None, None]}, draws=4)
    assert len(rows) == 12
    assert [float(row["encoder_hidden_states"]) for row in rows[:6]] == [0, 1, 2, 0, 1, 2]
    assert torch.equal(rows[7]["sample"], rows[7:9][0]["sample"])
    assert len({float(row["labels"].sum()) for row in rows}) == 12
    with pytest.raises(IndexError):
        rows[12]


def test_held_out_images_are_measured_all_over_the_schedule() -> None:
    schedule, images = Diffusion(diffusers.DDPMScheduler()), torch.randn(2, 1, 2, 2)
    rows = held_out_rows(schedule, images, {}, timesteps=4)
    assert [int(row["timestep"]) for row in rows] == [125, 375, 625, 875] * 2
    train = NoisyRows(schedule, images, {}, draws=9)
    assert not {float(row["labels"].sum()) for row in rows} & {float(row["labels"].sum()) for row in train}


def test_the_unet_is_diffusers_own_with_a_loss(task: Task) -> None:
    (batch,) = task.batches(4, 4)
    plain = diffusers.UNet2DConditionModel.from_config(task.base.config)
    plain.load_state_dict(task.base.state_dict())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        expected, found = plain(**inputs).sample, task.base(**batch)
    assert torch.equal(found.sample, expected)
    wanted = (expected.double() - batch["labels"].double()).square().mean()
    assert relative_error(found.loss, wanted) < rounding(plain)


def test_the_metric_is_the_mean_error_of_each_row_alone(tiles: Path) -> None:
    settings = settings_of(tiles)
    task, base = make_task(settings), load_image_base(settings.base, settings.data)
    split = task.data.splits["test"]
    with torch.no_grad():
        told = base.captions([row["caption"] for row in split.rows], settings.data)
        errors = [
            (base.model(**{n: v[None] for n, v in row.items() if n != "labels"}).sample[0] - row["labels"]).double()
            for row in held_out_rows(base.schedule, all_pixels(split, settings.data), told, timesteps=3)
        ]
    expected = 100 * torch.stack(errors).square().mean()
    found = torch.tensor(task.evaluate(task.base, "test")["denoising_loss"])
    assert relative_error(found, expected) < rounding(base.model)


def test_padding_and_other_captions_of_a_batch_change_no_state(tiles: Path) -> None:
    settings = settings_of(tiles)
    base = load_image_base(settings.base, settings.data)
    captions = ["red tile 1", "a much longer caption of orange squares", ""]
    with torch.no_grad():
        together = base.captions(captions, settings.data)["encoder_hidden_states"]
        alone = [base.captions([caption], settings.data)["encoder_hidden_states"] for caption in captions]
    assert relative_error(together, torch.cat(alone)) < rounding(base.captions.encoders[0].model)
    with pytest.raises(ValueError, match=r"'a much longer.*more than data.max_length=12"):
        base.captions(captions, dataclasses.replace(settings.data, too_long="refuse"))
    with pytest.raises(ValueError, match="max_length=78 is more than the 77 tokens"):
        base.captions(captions, dataclasses.replace(settings.data, max_length=78))


# The base


def test_the_base_is_trained_once_on_the_other_families(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = image_pretraining._train
    monkeypatch.setenv("PEFT_RESLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(image_pretraining, "_train", lambda *a: seen.append(a) or original(*a))
    first, again = (make_task(settings_of(tiles)).base.state_dict() for _ in range(2))
    assert len(seen) == 1
    assert all(torch.equal(first[name], again[name]) for name in first)
    _, _, images, tokens = seen[0]
    assert len(images) == 16  # all cold ones, and none of those that are held back
    assert len(tokens) == 17  # and the empty caption
    assert {round(float(value), 4) for value in images[:, 0].flatten()} == {
        round(red / 127.5 - 1, 4) for red in (20, 140)
    }
    make_task(settings_of(tiles, "data.images.family=cold"))
    assert len(seen) == 2


# What is generated


def test_the_encoder_sees_what_is_alike(tiles: Path) -> None:
    data = settings_of(tiles).data
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    encoder = FixedEncoder(images)
    codes = encoder(images)
    assert torch.allclose(codes.norm(dim=1), torch.ones(6), atol=6 * torch.finfo(torch.float32).eps * 32)
    assert similarity(codes, codes) == pytest.approx(100, rel=1e-5)
    assert drift(codes, codes) == pytest.approx(0, abs=1e-4)
    assert drift(codes, codes.roll(1, 0)) == pytest.approx(100 - similarity(codes, codes.roll(1, 0)), rel=1e-5)
    assert torch.equal(FixedEncoder(images)(images), codes)
    assert data.images is not None


def test_an_adapter_without_effect_has_no_drift_and_one_with_effect_has(task: Task) -> None:
    assert task.forgetting is not None
    model = get_peft_model(task.fresh_model(), LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"]))
    assert task.forgetting(model) == pytest.approx(0, abs=1e-3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert task.forgetting(model) > 1e-2


def test_a_run_leaves_its_numbers_and_a_grid_of_images(tiles: Path, tmp_path: Path) -> None:
    metrics = train(tiny_image_run(tiles, tmp_path / "run"))
    assert set(metrics["after_merge"]["test"]) == {"input_norm"}
    assert set(metrics["generated"]) == {"similarity"}
    assert metrics["forgetting"] >= 0
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter", "lora", "images", "images.png", "metrics.json", "README.md"} <= files
    steps = sorted(path.name for path in (tmp_path / "run" / "images").iterdir())
    assert steps == [f"step-{step:06d}.png" for step in range(5)]
    with Image.open(tmp_path / "run" / "images" / steps[0]) as row:
        assert row.size == (2 * SIDE, SIDE)
    checksums = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["data_sha256"]
    assert {"train", "images of train", "images of test"} <= set(checksums)
    result = json.loads((tmp_path / "run" / "method_comparison.json").read_text(encoding="utf-8"))
    last = result["train_info"]["metrics"][-1]
    assert last["test denoising_loss"] == metrics["before_merge"]["test"]["denoising_loss"]
    assert last["test accuracy"] is None
    task = make_task(settings_of(tiles))
    loaded = PeftModel.from_pretrained(task.fresh_model(), tmp_path / "run" / "adapter")
    assert task.evaluate(loaded, "test") == metrics["before_merge"]["test"]


@pytest.mark.slow
def test_drawing_changes_nothing_of_the_training(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [train(tiny_image_run(tiles, tmp_path / "drawn"), "export=false")["losses"]]
    monkeypatch.setattr("peft_reslora.experiments.image_task.Drawing.watch", lambda *_: TrainerCallback())
    losses.append(train(tiny_image_run(tiles, tmp_path / "plain"), "export=false")["losses"])
    assert losses[0] == losses[1]


# Comparisons


def test_lower_is_better_turns_the_verdict() -> None:
    values, reference = [1.0, 1.1, 0.9, 1.0, 1.05], [2.0, 2.0, 2.1, 1.9, 2.0]
    lower = paired_difference(values, reference, lower_is_better=True)
    assert lower.verdict == "better"
    assert lower.mean < 0
    assert paired_difference(reference, values, lower_is_better=True).verdict == "worse"
    assert paired_difference(values, reference).verdict == "worse"


def prepared(tiles: Path, output: Path) -> comparison.Comparison:
    settings = compare_settings(from_mapping(tiny_image_comparison(tiles, output)))
    return comparison.prepare(settings, (1, 1), lambda line: None)


@pytest.mark.slow
def test_the_rate_with_the_lowest_loss_is_chosen(tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lines as if everything had run: the loss rises with the distance from one rate."""
    made = {
        "_cost": lambda *_: {"step_ratio": 1.0, "memory_ratio": 1.0, "pairs": 1},
        "_search": lambda self, name, k, seed: {"validation": 5.0 + abs(k + 11), "losses": [1.0]},
        "_report": lambda self, name, k, seed: {
            "test": 5.0 - (name != "LoRA") + seed / 10,
            "merged": {},
            "losses": [1.0, 0.5],
            "steps": 2,
            "generated": {"similarity": 40.0 + seed},
        },
    }
    for name, method in made.items():
        monkeypatch.setattr(comparison.Comparison, name, method)
    made_up = prepared(tiles, tmp_path / "out")
    for name in ("LoRA", "ResLoRA middle"):
        made_up.run_method(name)
    lora, other = made_up.report()
    assert lora.rate == other.rate == pytest.approx(10 ** (-11 / 4), rel=1e-3)
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(-1)
    assert other.similarity == pytest.approx(41)
    text = (tmp_path / "out" / "REPORT.md").read_text(encoding="utf-8")
    assert "in %, lower is better" in text
    assert "similarity" in text


@pytest.mark.slow
def test_a_comparison_draws_a_grid_for_each_method(tiles: Path, tmp_path: Path) -> None:
    summaries = compare(tiny_image_comparison(tiles, tmp_path / "out"))
    assert [len(summary.tests) for summary in summaries] == [3, 3]
    assert all(summary.similarity is not None and summary.forgetting is not None for summary in summaries)
    assert {path.name for path in (tmp_path / "out" / "images").glob("*.png")} == {"lora.png", "reslora-middle.png"}
    firsts = {line["losses"][0] for line in read_lines(tmp_path / "out") if line["kind"] == "report"}
    assert len({round(loss, 4) for loss in firsts}) == 3  # one a seed: at the start all methods are the base


def test_names_of_methods_become_different_file_names() -> None:
    names = ["LoRA", "LoRA+", "ResLoRA block 1", "ResLoRA-block-1", "LoRA "]
    found = [comparison.file_name(name) for name in names]
    assert found[0] == "lora"
    assert found[2] == "reslora-block-1"
    assert all(name.replace("-", "").isalnum() for name in found)
    assert len(set(found)) >= 4


# The configs that come with the package


@pytest.mark.slow
def test_what_the_comments_of_the_configs_say_is_linked_in_stable_diffusion() -> None:
    """Each chain has one width, and in Stable Diffusion each width within down_blocks or up_blocks one resolution."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # else the defaults are SD 1's
    table = str(describe_chains(unet, ResLoRAConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"])))
    chains, _, _ = table.partition("links not made:")
    lines = [line.split() for line in chains.splitlines()[3:]]
    assert len(lines) == 3 * 8 + 3 * 8 + 8  # three widths down, three up, one in the middle; eight layers a block
    for role, layers, shape, _, links, first, last in lines:
        assert first.split(".")[0] == last.split(".")[0] or role.startswith("mid_block"), (role, shape)
        assert int(layers) == {"down": 2, "up": 3, "mid": 1}[role.split("_")[0]]
        assert int(links) == int(layers) - 1


@pytest.mark.parametrize("shortcut", ["input", "middle", "block"])
def test_the_small_unet_of_the_configs_has_links_in_every_part(shortcut: str, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    write_tiles(folder)
    text = (folder / "captions.csv").read_text(encoding="utf-8").replace("warm", "Food & Drink")
    (folder / "captions.csv").write_text(text, encoding="utf-8")
    rows = "data.validation_rows=3", "data.test_rows=3", "data.images.size=8"
    read = read_config(
        find_config("emoji-unet-reslora"), [f"data.folder={folder}", f"tuner.shortcut={shortcut}", *rows]
    )
    said = describe_run(train_settings(read))
    assert "80 layers in 30 chains, 50 links" in said
    assert "10 train, 3 validation, 3 test" in said
    assert "80 of 8 rows" in said
