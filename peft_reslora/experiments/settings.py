"""What a YAML file of a training run may say, section by section."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from peft_reslora.experiments.config_file import ConfigFile, build, check_type, refuse_unknown_keys

TaskName = Literal["classification", "regression", "generation", "choice", "text_to_image"]
Head = Literal["fit", "train"]


@dataclass(frozen=True)
class HubData:
    """A data set of the Hugging Face Hub, and how its splits and columns are called there."""

    name: str
    config: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None
    rename: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageSettings:
    """The images beside the captions, and what is drawn of them.

    Args:
        column: holds images (of the Hub), their paths from the file that lists them, or with `sheet` numbers of tiles.
        sheet: one picture with all images as square tiles, row by row.
        size: side in pixels; other images are cut to a square around their center and resized.
        family: the only rows that count are those with this value of `family_column`; others pretrain a base.
        draws: how many noises an image has; an epoch goes through all of them.
        timesteps: at how many the held-out images are measured.
        unrelated: captions on which the drift is measured; without them those of other families, if there are.
        samples: of how many captions images are generated, at most, for similarity and for drift.
    """

    column: str = "image"
    sheet: str | None = None
    size: int = 32
    family: str | None = None
    family_column: str = "category"
    draws: int = 100
    timesteps: int = 8
    unrelated: list[str] = field(default_factory=list)
    samples: int = 12
    shown: int = 6
    sampling_steps: int = 20
    guidance: float = 3.0


@dataclass(frozen=True)
class DataSettings:
    """Where the rows come from: the Hub, or `files` (csv, tsv, jsonl, parquet) in `folder`, which goes first.

    Or `uuid_pairs` random ones, which are learned by heart: all splits are the same. With `chat_template`, prompt and
    completion are the turns of a user and an assistant, as the tokenizer's template writes them (`true`), or the one
    that is given (Jinja). `messages` is a column of whole conversations, lists of `role` and `content`.
    """

    hub: HubData | None = None
    folder: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    text: list[str] = field(default_factory=lambda: ["text"])
    label: str = "label"
    answer: str | None = None
    endings: str | None = None
    new_tokens: int = 24
    match: Literal["number", "characters"] = "number"
    uuid_pairs: int | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    test_rows: int | None = None
    chat_template: bool | str = False
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int = 64
    too_long: Literal["truncate", "refuse"] = "truncate"
    images: ImageSettings | None = None
    messages: str | None = None


@dataclass(frozen=True)
class TextSource:
    """Rows to pretrain on: of the Hub, or a `file` in the folder; `text` is a template with the names of columns."""

    text: str
    hub: HubData | None = None
    file: str | None = None
    masked_numbers: bool = False


@dataclass(frozen=True)
class PretrainSettings:
    """What a model that is built in code learns before it is frozen: a language model the text of `sources`.

    A UNet learns the images of all families but the one that is adapted to.
    """

    sources: list[TextSource] = field(default_factory=list)
    folder: str | None = None
    steps: int = 800
    rate: float = 2e-3
    batch: int = 16
    length: int = 128


@dataclass(frozen=True)
class BaseSettings:
    """The frozen model: `minilm`, a Hub name or folder; or `config`, a model type, with the fields of its config.

    With `load_in_4bit`, a language model is loaded as in QLoRA (arXiv 2305.14314), and computes in `dtype`.
    With `config: unet`, diffusers' UNet2DConditionModel; `text_encoder` has the fields of its CLIPTextConfig.
    """

    name: str | None = None
    config: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    head: Head = "train"
    head_rows: int = 1000
    vocabulary: int = 2000
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    load_in_4bit: bool = False
    pretrain: PretrainSettings | None = None
    text_encoder: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainSettings:
    """A training run: the base, its data, the tuner, how it is trained, and what is written."""

    task: TaskName
    base: BaseSettings
    data: DataSettings
    tuner: dict[str, Any]
    training: dict[str, Any]
    output_dir: str = "run"
    seed: int = 0
    loraplus_lr_ratio: float | None = None
    calibration_rows: int = 0
    annealed: bool = False
    merge: bool = False
    export: bool = True
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    threads: int | None = None


_OWN_BASE_KEYS = [f.name for f in dataclasses.fields(BaseSettings) if f.name != "fields"]
# Arguments of the Trainer that the settings have elsewhere, or that the run decides.
_SET_ELSEWHERE = {
    "output_dir": "output_dir",
    "seed": "seed",
    "data_seed": "seed",
    "report_to": "report_to",
    "label_names": None,
    "remove_unused_columns": None,
    "resume_from_checkpoint": None,
}
SFT_KEYS = {"packing": bool, "completion_only_loss": bool}
"""Arguments of TRL's SFTConfig; a run of generation that has one is trained by its SFTTrainer."""
_GROUPED = "group_by_length"  # an argument of its own, or a value of train_sampling_strategy


def train_settings(config: ConfigFile) -> TrainSettings:
    """Check a whole file; nothing is loaded but the classes whose fields it names.

    Raises:
        ValueError: for the first key or value that is not accepted, with its place.
    """
    values = dict(config.values)
    if "base" in values:
        values["base"] = base_values(config, values["base"])
    settings = build(TrainSettings, ConfigFile(values, config.places))
    check_tuner(config, ("tuner",), settings.tuner)
    check_training(config, settings.training, SFT_KEYS if settings.task == "generation" else {})
    check_annealed(config, ("annealed",), settings.annealed, settings.tuner)
    check_sizes(config, settings.data)
    if settings.base.load_in_4bit and (settings.task != "generation" or settings.base.name is None):
        place = config.place(("base", "load_in_4bit"))
        raise ValueError(f"{place}: base.load_in_4bit is for task=generation and a base with a name.")
    if settings.data.chat_template and settings.task != "generation":
        place = config.place(("data", "chat_template"))
        raise ValueError(f"{place}: data.chat_template is for task=generation, not {settings.task}.")
    check_messages(config, settings)
    check_images(config, settings)
    return settings


def base_values(config: ConfigFile, given: Any) -> dict[str, Any]:
    """`base: minilm` and `base: {config: llama, hidden_size: 64}`, written out with their own keys and `fields`."""
    if isinstance(given, str):
        return {"name": given}
    if not isinstance(given, Mapping):
        raise ValueError(f"{config.place(('base',))}: base must be a name or a mapping.")
    if ("name" in given) == ("config" in given):
        raise ValueError(
            f"{config.place(('base',))}: base needs either name (minilm, a Hub name, a folder) or config."
        )
    if "config" not in given:
        return dict(given)
    known = unet_fields() if given["config"] == "unet" else _config_fields(config, str(given["config"]))
    refuse_unknown_keys(config, ("base",), given, [*_OWN_BASE_KEYS, *known])
    own = {name: value for name, value in given.items() if name in _OWN_BASE_KEYS}
    return {**own, "fields": {name: value for name, value in given.items() if name not in own}}


def as_config(settings: Any) -> dict[str, Any]:
    """All settings with their defaults, as a file that gives the same settings holds them."""
    values = dataclasses.asdict(settings)
    base = values["base"]
    fields = base.pop("fields")
    # Of name and config one only may stand there, and the fields of a config stand beside them.
    values["base"] = {name: value for name, value in base.items() if value is not None} | fields
    return values


def require_diffusers() -> None:
    """Refuse to go on without what makes images.

    Raises:
        ImportError: if diffusers is missing; it names the extra that brings it.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise ImportError("text_to_image needs diffusers: pip install 'peft_reslora[images]'")


def unet_fields() -> list[str]:
    """The arguments of diffusers' UNet that are not decided by images and captions."""
    require_diffusers()
    from diffusers import UNet2DConditionModel

    decided = {"self", "sample_size", "in_channels", "out_channels", "cross_attention_dim"}
    return [name for name in inspect.signature(UNet2DConditionModel.__init__).parameters if name not in decided]


def _config_fields(config: ConfigFile, model_type: str) -> list[str]:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        import difflib

        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{config.place(('base', 'config'))}: {model_type!r} is no model type of transformers.{hint}")
    return [f.name for f in dataclasses.fields(CONFIG_MAPPING[model_type])]


def check_tuner(config: ConfigFile, key: tuple[str, ...], tuner: Mapping[str, Any]) -> None:
    """Refuse fields that the config class of this `peft_type` does not have, and values of another type.

    Raises:
        ValueError: with the place, the nearest known field, and what is accepted.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import peft_reslora  # noqa: F401  registers both tuners

    by_name = {member.value: kind for member, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    peft_type = tuner.get("peft_type")
    if peft_type not in by_name:
        raise ValueError(
            f"{config.place((*key, 'peft_type'))}: {'.'.join(key)}.peft_type={peft_type!r} must be one of "
            f"{', '.join(sorted(by_name))}."
        )
    kind = by_name[peft_type]
    refuse_unknown_keys(config, key, tuner, [f.name for f in dataclasses.fields(kind)])
    hints = _hints(kind)
    for name, value in tuner.items():
        if name not in ("peft_type", "task_type"):
            check_type(config, (*key, name), hints.get(name, Any), value)


def check_annealed(config: ConfigFile, key: tuple[str, ...], annealed: bool, tuner: Mapping[str, Any]) -> None:
    """Refuse to train away shortcuts that are not there, or that merge exactly as they are.

    Raises:
        ValueError: with the place, what the tuner is and what it must be.
    """
    shortcut = tuner.get("shortcut", "block") if tuner["peft_type"] == "RESLORA" else None
    if annealed and shortcut not in ("input", "middle"):
        found = tuner["peft_type"] if shortcut is None else f"RESLORA with shortcut={shortcut!r}"
        raise ValueError(
            f"{config.place(key)}: {'.'.join(key)}=true needs RESLORA with shortcut 'input' or 'middle', whose merge "
            f"is an estimate, not {found}."
        )


def check_training(config: ConfigFile, training: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> None:
    """Refuse what neither TrainingArguments nor `more` has, what stands elsewhere, and rows grouped by length."""
    from transformers import TrainingArguments

    hints = {**_hints(TrainingArguments), **(more or {})}
    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init] + list(more or {})
    for name in training:
        if name in _SET_ELSEWHERE:
            instead = _SET_ELSEWHERE[name]
            hint = f"write {instead} at the top level" if instead else "the run sets it"
            raise ValueError(f"{config.place(('training', name))}: training.{name} is not set here, {hint}.")
        if training[name] == _GROUPED or (name == _GROUPED and training[name]):
            raise ValueError(
                f"{config.place(('training', name))}: training.{name}={training[name]!r} gives the rows another order "
                "after a resume and for each tuner, since transformers draws it from the generator that initializes "
                "the tuner; leave it out."
            )
    refuse_unknown_keys(config, ("training",), training, [name for name in known if name not in _SET_ELSEWHERE])
    for name, value in training.items():
        check_type(config, ("training", name), hints.get(name, Any), value)


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Annotations of a dataclass of others; those that only exist for type checkers are left out."""
    try:
        return typing.get_type_hints(kind)
    except (NameError, TypeError):
        return {}


class _Described(Protocol):
    """What a run and a comparison have in common."""

    @property
    def task(self) -> TaskName: ...
    @property
    def base(self) -> BaseSettings: ...
    @property
    def data(self) -> DataSettings: ...


def check_messages(config: ConfigFile, settings: _Described) -> None:
    """Refuse conversations without a template that writes them, and for another task."""
    data = settings.data
    if data.messages is not None and (settings.task != "generation" or not data.chat_template):
        place = config.place(("data", "messages"))
        raise ValueError(f"{place}: data.messages needs task=generation and data.chat_template (true, or a template).")


_IMAGE_SIZES = ("size", "draws", "timesteps", "samples", "shown", "sampling_steps")


def check_images(config: ConfigFile, settings: _Described) -> None:
    """Refuse a task with images without `data.images`, sizes that are not positive, and fields that CLIP has not."""
    images = settings.data.images
    if (images is not None) != (settings.task == "text_to_image"):
        needed = "needs" if images is None else "has no use for"
        raise ValueError(f"{config.place(('data', 'images'))}: task={settings.task} {needed} data.images.")
    if images is None:
        return
    require_diffusers()
    for name in _IMAGE_SIZES:
        if (value := getattr(images, name)) < 1:
            raise ValueError(f"{config.place(('data', 'images', name))}: data.images.{name}={value} must be positive.")
    if settings.base.config is not None and (settings.base.config != "unet" or settings.base.pretrain is None):
        raise ValueError(f"{config.place(('base',))}: text_to_image needs base.name, or config=unet with pretrain.")
    if settings.base.pretrain is not None and images.family is None:
        raise ValueError(
            f"{config.place(('data', 'images'))}: data.images.family is missing; the base is pretrained on all others."
        )
    from transformers import CLIPTextConfig

    refuse_unknown_keys(
        config,
        ("base", "text_encoder"),
        settings.base.text_encoder,
        [f.name for f in dataclasses.fields(CLIPTextConfig)],
    )


_SIZES = ("train_rows", "validation_rows", "test_rows", "max_length", "new_tokens", "uuid_pairs")


def check_sizes(config: ConfigFile, data: DataSettings) -> None:
    """Refuse sizes that are not positive, and data without a source."""
    sizes = {name: getattr(data, name) for name in _SIZES}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{config.place(('data', name))}: data.{name}={value} must be a positive integer.")
    if data.hub is None and not data.files and data.uuid_pairs is None:
        raise ValueError(f"{config.place(('data',))}: data needs hub, files or uuid_pairs.")
