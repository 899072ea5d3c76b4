"""A plugin file of ms-swift (run with 4.6.0): `--tuner_type reslora` or `--tuner_type mora`.

    swift sft --external_plugins "$(python -m peft_reslora.integrations ms_swift)" --tuner_type reslora \\
        --model_kwargs '{"reslora": {"shortcut": "block", "pre_num": 2}}' ...

What stands under `reslora` or `mora` are fields of `ResLoRAConfig` or `MoRAConfig`; rank, alpha, dropout and targets
are ms-swift's own arguments, as for LoRA. ms-swift notes the plugin beside each checkpoint, so that its other commands
(`swift infer`, `swift export --merge_lora true`) find it by themselves.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from peft_reslora import MoRAConfig, ResLoRAConfig
from peft_reslora.integrations.sections import check_section

# ms-swift puts a plugin's folder before all others, where `import axolotl` would find the joint of that name.
if os.path.dirname(os.path.abspath(__file__)) in sys.path:
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))

# ms-swift's kinds of tasks that are a model of another kind for PEFT; it does the same for LoRA.
_TASKS = {"RERANKER": "SEQ_CLS", "GENERATIVE_RERANKER": "CAUSAL_LM", "DECISION": "CAUSAL_LM"}

# Arguments that would have no effect, with the value that asks for nothing.
_REFUSED: dict[str, tuple[Any, str]] = {
    "tuner_backend": ("peft", "Unsloth reads LoRA's factors past the layers; leave it at 'peft'"),
    "use_swift_lora": (False, "leave it out"),
    "lora_dtype": (None, "adapters are trained in float32; leave it out"),
    "lorap_lr_ratio": (None, "ms-swift looks for its own LoRA; leave it out"),
    "use_galore": (False, "leave it out"),
}
_REFUSED_BY_MORA: dict[str, tuple[Any, str]] = {
    "use_dora": (False, "leave it out"),
    "use_rslora": (False, "leave it out"),
    "target_parameters": (None, "leave it out"),
}


class _Tuner(PeftTuner):
    """ms-swift asks a tuner for a new adapter, to save it, and to load it."""

    name: str
    config: type[PeftConfig]
    refused = _REFUSED

    @classmethod
    def prepare_model(cls, args: Any, model: nn.Module) -> nn.Module:
        """A new adapter.

        Raises:
            ValueError: for an argument that would have no effect, or a field that the tuner does not know.
        """
        for argument, (nothing, remedy) in cls.refused.items():
            if getattr(args, argument, nothing) != nothing:
                raise ValueError(f"--{argument} cannot be used with `--tuner_type {cls.name}`: {remedy}.")
        fields = _common_fields(args, model) | cls.own_fields(args)
        section = (args.model_kwargs or {}).get(cls.name) or {}
        check_section(cls.name, cls.config, section, fields, trainer="ms-swift")
        return get_peft_model(model, cls.config(**fields, **section))

    @classmethod
    def own_fields(cls, args: Any) -> dict[str, Any]:
        """The fields of this tuner alone."""
        raise NotImplementedError

    @staticmethod
    def save_pretrained(
        model: Any, save_directory: str, state_dict: dict[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """As ms-swift's own, which leaves `state_dict` out: under ZeRO-3, only there are the tensors whole."""
        if isinstance(model, PeftModel):
            kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, state_dict=state_dict, **kwargs)


class ResLoRATuner(_Tuner):
    """`--tuner_type reslora`."""

    name, config = "reslora", ResLoRAConfig

    @classmethod
    def own_fields(cls, args: Any) -> dict[str, Any]:
        return {
            "lora_alpha": args.lora_alpha,
            "lora_dropout": args.lora_dropout,
            "bias": args.lora_bias,
            "use_rslora": args.use_rslora,
            "use_dora": args.use_dora,
            "init_lora_weights": args.init_weights,
            "target_parameters": args.target_parameters,
        }


class MoRATuner(_Tuner):
    """`--tuner_type mora`, which has no alpha."""

    name, config = "mora", MoRAConfig
    refused = _REFUSED | _REFUSED_BY_MORA

    @classmethod
    def own_fields(cls, args: Any) -> dict[str, Any]:
        return {"mora_dropout": args.lora_dropout, "bias": args.lora_bias, "init_weights": args.init_weights}


def _common_fields(args: Any, model: nn.Module) -> dict[str, Any]:
    # Imported late: ms-swift reads plugins before its commands.
    from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules

    task = args.task_type.upper()
    task = _TASKS.get(task, task)
    return {
        "r": args.lora_rank,
        "target_modules": get_target_modules(args, model),
        "modules_to_save": get_modules_to_save(args, model, task) or None,
        "task_type": task if task in TaskType.__members__ else None,
    }


tuners_map.update({tuner.name: tuner for tuner in (ResLoRATuner, MoRATuner)})
