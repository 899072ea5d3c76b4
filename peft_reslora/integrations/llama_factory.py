"""A launcher of LLaMA-Factory (run with 0.9.5) for `llamafactory-cli`: a section `reslora` or `mora` in its YAML.

    python -m peft_reslora.integrations.llama_factory train train.yaml

    finetuning_type: lora
    lora_rank: 8
    lora_target: all
    reslora: {shortcut: block, pre_num: 2}

What stands in the section are fields of `ResLoRAConfig` or `MoRAConfig`; rank, alpha, dropout and targets are
LLaMA-Factory's own keys, as for LoRA. Its commands other than `train` take no section: the adapter says what it is.
In several processes, start it by `torchrun -m peft_reslora.integrations.llama_factory train train.yaml`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory import cli
from llamafactory.hparams.parser import read_args
from llamafactory.model import adapter
from llamafactory.train.tuner import run_exp
from peft import PeftConfig

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.integrations.sections import check_section

_CONFIGS: dict[str, type[PeftConfig]] = {"reslora": ResLoRAConfig, "mora": MoRAConfig}

# Of the fields that LLaMA-Factory gives to a LoRA: what MoRA lacks. It gives lora_alpha always.
_NOT_IN_MORA = ("lora_alpha", "use_rslora", "use_dora", "init_lora_weights")

# What would be passed by, or is another method.
_REFUSED = {
    "use_unsloth": "it reads LoRA's factors past the layers; leave it out",
    "use_kt": "it reads LoRA's factors past the layers; leave it out",
    "use_ray": "its workers do not know the tuners; start the processes by torchrun",
    "pissa_convert": "leave it out",
    "loraplus_lr_ratio": "it tells LoRA's factors by their names; leave it out",
    "create_new_adapter": "merge the adapter before with `export`, and train a new one on what it wrote",
}


def main() -> None:
    """`llamafactory-cli` with the tuners known, and with their sections in the YAML of `train`."""
    if sys.argv[1:2] != ["train"]:
        cli.main()
        return
    del sys.argv[1]
    settings = read_args()
    if not isinstance(settings, dict):  # arguments of the command line, which hold no section
        run_exp(settings)
        return
    name, section = take_section(settings)
    if name is None:
        run_exp(settings)
        return
    with making(name, section):
        run_exp(settings)


def take_section(settings: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Take the tuner's section out of the settings; (None, {}) where there is none.

    Raises:
        ValueError: if there are two, or a setting would have no effect.
    """
    names = [name for name in _CONFIGS if name in settings]
    if not names:
        return None, {}
    if len(names) > 1:
        raise ValueError("There are sections for reslora and mora; leave one of them out.")
    name = names[0]
    if settings.get("finetuning_type", "lora") != "lora":
        raise ValueError(
            f"finetuning_type: {settings['finetuning_type']} does not go with a section {name}; take lora."
        )
    for key, remedy in _REFUSED.items():
        if settings.get(key):
            raise ValueError(f"{key} cannot be used with a section {name}: {remedy}.")
    if name == "mora" and settings.get("lora_alpha"):
        raise ValueError("lora_alpha has no meaning for MoRA; leave it out.")
    return name, settings.pop(name) or {}


@contextmanager
def making(name: str, section: dict[str, Any]) -> Iterator[None]:
    """Have LLaMA-Factory make the tuner's config where it makes LoRA's."""

    def config(**fields: Any) -> PeftConfig:
        if name == "mora":
            if asked := [key for key in _NOT_IN_MORA if key != "lora_alpha" and fields.get(key)]:
                raise ValueError(f"{asked[0]} has no meaning for MoRA; leave out what asks for it.")
            fields["mora_dropout"] = fields.pop("lora_dropout", 0.0)
            fields = {key: value for key, value in fields.items() if key not in _NOT_IN_MORA}
        check_section(name, _CONFIGS[name], section, fields, trainer="LLaMA-Factory")
        return _CONFIGS[name](**fields, **section)

    original = adapter.LoraConfig
    adapter.LoraConfig = config
    try:
        yield
    finally:
        adapter.LoraConfig = original


if __name__ == "__main__":
    main()
