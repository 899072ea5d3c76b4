"""ResLoRA: LoRA with residual shortcuts between the blocks of consecutive layers (arXiv 2402.18039)."""

from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.describe import describe_chains
from peft_reslora.reslora.merging.calibrate import calibrate_merge
from peft_reslora.reslora.merging.report import merge_report
from peft_reslora.reslora.model import ResLoRAModel

__all__ = ["ResLoRAConfig", "ResLoRAModel", "calibrate_merge", "describe_chains", "merge_report"]
