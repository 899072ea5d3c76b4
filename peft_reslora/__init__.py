"""ResLoRA and MoRA as PEFT tuners; importing this package registers them with PEFT."""

from peft_reslora.registration import register

register()

from peft_reslora.export import LoraExport, export_lora, export_lora_from_files, save_as_lora  # noqa: E402
from peft_reslora.mora import MoRAConfig, MoRAModel  # noqa: E402
from peft_reslora.reslora import (  # noqa: E402
    ResLoRAConfig,
    ResLoRAModel,
    calibrate_merge,
    describe_chains,
    merge_report,
)

__all__ = [
    "LoraExport",
    "MoRAConfig",
    "MoRAModel",
    "ResLoRAConfig",
    "ResLoRAModel",
    "calibrate_merge",
    "describe_chains",
    "export_lora",
    "export_lora_from_files",
    "merge_report",
    "save_as_lora",
]
