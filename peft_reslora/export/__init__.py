"""Standard LoRA checkpoints from ResLoRA, MoRA, LoRA, AdaLoRA, LoHa and LoKr adapters."""

from peft_reslora.export.checkpoint import LoraExport
from peft_reslora.export.from_files import export_lora_from_files
from peft_reslora.export.from_model import export_lora, save_as_lora
from peft_reslora.export.pipeline import save_for_pipeline

__all__ = ["LoraExport", "export_lora", "export_lora_from_files", "save_as_lora", "save_for_pipeline"]
