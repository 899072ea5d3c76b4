"""What a YAML file of a comparison may say: a training run's sections, and methods in place of one tuner."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft_reslora.experiments.config_file import ConfigFile, build
from peft_reslora.experiments.rates import nearest_quarter
from peft_reslora.experiments.settings import (
    BaseSettings,
    DataSettings,
    TaskName,
    TrainSettings,
    base_values,
    check_annealed,
    check_images,
    check_messages,
    check_sizes,
    check_training,
    check_tuner,
)


@dataclass(frozen=True)
class MethodSettings:
    """A tuner, the ratio of learning rates of LoRA+, and whether its shortcuts are to be annealed as well."""

    tuner: dict[str, Any]
    loraplus_lr_ratio: float | None = None
    annealed: bool = False


@dataclass(frozen=True)
class RateSettings:
    """The range of the first half-decade grid; it is extended while the best lies at its edge."""

    lowest: float = 1e-4
    highest: float = 1e-2


@dataclass(frozen=True)
class CompareSettings:
    """A comparison: one task, many methods, the grid of learning rates and the seeds."""

    task: TaskName
    base: BaseSettings
    data: DataSettings
    training: dict[str, Any]
    methods: dict[str, MethodSettings]
    reference: str
    tuner: dict[str, Any] = field(default_factory=dict)
    output_dir: str = "comparison"
    title: str = "Comparison"
    match_parameters: bool = True
    rates: RateSettings = field(default_factory=RateSettings)
    search_seed: int = 100
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    calibration_rows: int = 256
    cost_pairs: int = 12
    threads: int | None = None


def compare_settings(config: ConfigFile) -> CompareSettings:
    """Check a whole file; the fields in `tuner` go into every method.

    Raises:
        ValueError: for the first key or value that is not accepted, with its place.
    """
    values = dict(config.values)
    if "base" in values:
        values["base"] = base_values(config, values["base"])
    settings = build(CompareSettings, ConfigFile(values, config.places))
    settings = dataclasses.replace(settings, methods=_methods(config, settings))
    check_training(config, settings.training)
    check_sizes(config, settings.data)
    check_images(config, settings)
    check_messages(config, settings)
    _check_protocol(config, settings)
    return settings


def _methods(config: ConfigFile, settings: CompareSettings) -> dict[str, MethodSettings]:
    """Each with the common fields, as far as its own do not say otherwise."""
    full = {}
    common = {name: config.place(("tuner", name)) for name in settings.tuner}
    for name, method in settings.methods.items():
        tuner = {**settings.tuner, **method.tuner}
        key = ("methods", name, "tuner")
        places = dict(config.places)
        places |= {(*key, field): place for field, place in common.items() if field not in method.tuner}
        check_tuner(ConfigFile(config.values, places), key, tuner)
        check_annealed(config, ("methods", name, "annealed"), method.annealed, tuner)
        full[name] = dataclasses.replace(method, tuner=tuner)
    return full


def _check_protocol(config: ConfigFile, settings: CompareSettings) -> None:
    if settings.reference not in settings.methods:
        known = ", ".join(settings.methods)
        raise ValueError(f"{config.place(('reference',))}: reference={settings.reference!r} is none of {known}.")
    if "learning_rate" in settings.training:
        raise ValueError(f"{config.place(('training', 'learning_rate'))}: the comparison sets it; see rates.")
    seeds = set(settings.seeds)
    if len(seeds) < 3 or len(seeds) < len(settings.seeds) or settings.search_seed in seeds:
        raise ValueError(
            f"{config.place(('seeds',))}: seeds={settings.seeds} must be at least three, all different, and without "
            f"search_seed={settings.search_seed}, so that no run is chosen by its own luck."
        )
    if nearest_quarter(settings.rates.lowest) >= nearest_quarter(settings.rates.highest):
        raise ValueError(f"{config.place(('rates',))}: rates.lowest must be below rates.highest.")
    if settings.data.uuid_pairs is None and not _has_validation(settings.data):
        raise ValueError(f"{config.place(('data',))}: rates are chosen on a validation split; set validation_rows.")


def _has_validation(data: DataSettings) -> bool:
    if data.validation_rows is not None:
        return True
    if data.folder or data.hub is None:
        return "validation" in data.files
    return data.hub.validation is not None


def as_train_settings(settings: CompareSettings) -> TrainSettings:
    """What a task is made of."""
    reference = settings.methods[settings.reference]
    return TrainSettings(settings.task, settings.base, settings.data, reference.tuner, settings.training)
