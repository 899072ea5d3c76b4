"""A plugin of axolotl (read in 0.19.0): `adapter: reslora` or `adapter: mora` in its YAML.

    plugins: [peft_reslora.integrations.axolotl.Plugin]
    adapter: reslora
    lora_r: 8
    lora_alpha: 16
    lora_target_linear: true
    reslora: {shortcut: block, pre_num: 2}

What stands under `reslora` or `mora` are fields of `ResLoRAConfig` or `MoRAConfig`; r, alpha, dropout and targets are
axolotl's own keys, as for LoRA. It does not need the PEFT fork that axolotl's own MoRA plugin asks for.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from pydantic import BaseModel, Field
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.integrations.sections import check_section

_CONFIGS: dict[str, type[PeftConfig]] = {"reslora": ResLoRAConfig, "mora": MoRAConfig}

# axolotl's keys, and the fields they fill: of both tuners, of one of them.
_FIELDS = {
    "lora_r": "r",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
}
_OWN_FIELDS = {
    "reslora": {
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "lora_alpha_pattern": "alpha_pattern",
        "lora_fan_in_fan_out": "fan_in_fan_out",
        "lora_target_parameters": "target_parameters",
        "peft_init_lora_weights": "init_lora_weights",
        "peft_trainable_token_indices": "trainable_token_indices",
        "peft_use_dora": "use_dora",
        "peft_use_rslora": "use_rslora",
    },
    "mora": {"lora_dropout": "mora_dropout"},
}
_ALL_OWN = {key for fields in _OWN_FIELDS.values() for key in fields}

# What would be passed by: kernels that compute LoRA from the factors, and quantization, which axolotl ties to the
# names `qlora` and `lora`.
_REFUSED = {
    "lora_qkv_kernel": "it reads LoRA's factors past the layers; set it to false",
    "lora_o_kernel": "it reads LoRA's factors past the layers; set it to false",
    "lora_mlp_kernel": "it reads LoRA's factors past the layers; set it to false",
    "lora_embedding_kernel": "it reads LoRA's factors past the layers; set it to false",
    "load_in_4bit": "axolotl quantizes for `adapter: qlora` only; give a base model that is quantized already",
    "load_in_8bit": "axolotl quantizes for `adapter: lora` only; give a base model that is quantized already",
    "relora": "use peft_reslora's own restarts, peft_reslora.training.MergeAndRestartCallback",
    "peft_layer_replication": "leave it out",
    "lora_on_cpu": "leave it out",
}


class Args(BaseModel):
    """The sections that the plugin adds to axolotl's YAML."""

    reslora: dict[str, Any] = Field(default_factory=dict, description="Fields of ResLoRAConfig.")
    mora: dict[str, Any] = Field(default_factory=dict, description="Fields of MoRAConfig.")


class Plugin(BasePlugin):
    """Adapts the model with ResLoRA or MoRA in place of axolotl's LoRA."""

    def register(self, cfg: Any) -> None:
        """Choose the way of `axolotl merge-lora` that asks the layers; the other computes plain LoRA from the file.

        Raises:
            ValueError: if the other way is asked for.
        """
        if cfg.get("adapter") not in _CONFIGS:
            return
        if cfg.get("merge_method") not in (None, "legacy"):
            raise ValueError(
                f"merge_method: {cfg['merge_method']!r} reads plain LoRA's factors from the adapter's file, which "
                f"`adapter: {cfg['adapter']}` does not have; take 'legacy'."
            )
        cfg["merge_method"] = "legacy"

    def get_input_args(self) -> str:
        return f"{__name__}.{Args.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in _CONFIGS]

    def load_adapter(
        self, model: nn.Module, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, PeftConfig] | None:
        """A new adapter, or the one in `lora_model_dir`; None for other adapters.

        Raises:
            ValueError: for a setting that would have no effect, or that the tuner does not know.
        """
        if cfg.get("adapter") not in _CONFIGS:
            return None
        config = adapter_config(model, cfg)
        if config_only:
            return None, config
        dtype = cfg.get("peft_autocast_adapter_dtype")
        options = {} if dtype is None else {"autocast_adapter_dtype": dtype}
        if folder := cfg.get("lora_model_dir"):
            return PeftModel.from_pretrained(model, folder, is_trainable=not inference, **options), config
        return get_peft_model(model, config, **options), config


def adapter_config(model: nn.Module, cfg: Any) -> PeftConfig:
    """The tuner's config from axolotl's settings.

    Raises:
        ValueError: see `Plugin.load_adapter`.
    """
    adapter = cfg["adapter"]
    own = _OWN_FIELDS[adapter]
    _refuse(adapter, cfg, own)
    fields = {field: cfg[key] for key, field in {**_FIELDS, **own}.items() if cfg.get(key)}
    fields |= {"target_modules": _targets(cfg), "task_type": _task_type(model)}
    section = cfg.get(adapter) or {}
    check_section(adapter, _CONFIGS[adapter], section, fields, trainer="axolotl")
    return _CONFIGS[adapter](**fields, **section)


def _refuse(adapter: str, cfg: Any, own: dict[str, str]) -> None:
    for key, remedy in _REFUSED.items():
        if cfg.get(key):
            raise ValueError(f"{key} cannot be used with `adapter: {adapter}`: {remedy}.")
    for key in sorted(_ALL_OWN - set(own)):
        if cfg.get(key):
            raise ValueError(f"{key} has no meaning for `adapter: {adapter}`; leave it out.")
    if (loftq := (cfg.get("peft") or {}).get("loftq_config")) and loftq.get("loftq_bits"):
        raise ValueError(f"peft.loftq_config cannot be used with `adapter: {adapter}`; leave it out.")


def _targets(cfg: Any) -> str | list[str] | None:
    if not cfg.get("lora_target_linear"):
        return cfg.get("lora_target_modules") or None
    if cfg.get("lora_target_modules"):
        raise ValueError(
            "lora_target_linear takes all linear layers; leave lora_target_modules out, or set it to false."
        )
    return "all-linear"


def _task_type(model: nn.Module) -> TaskType:
    name = type(model).__name__
    kinds = {"SequenceClassification": TaskType.SEQ_CLS, "TokenClassification": TaskType.TOKEN_CLS}
    return next((task for part, task in kinds.items() if part in name), TaskType.CAUSAL_LM)
