"""Programs that save every adapter as if it were a LoRA: refused before they write what nobody can load.

They ask the adapter's config for its fields (`to_dict`) and write them into the file of the tensors, from which they
later make a plain `LoraConfig`. Nothing else of an adapter takes part in that, so it is the config that refuses.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from peft import PeftConfig

# Module and function of the caller, read in diffusers 0.42.1; the second is what its training scripts call.
_LORA_SAVERS = {
    ("diffusers.loaders.peft", "save_lora_adapter"),
    ("diffusers.training_utils", "_collate_lora_metadata"),
}
_DEPTH = 4  # frames between them and here: `to_dict` of the config and of its base classes


class NotSavedAsLora(PeftConfig if TYPE_CHECKING else object):  # type: ignore[misc]
    """A config whose adapter is no LoRA until it is exported."""

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT.

        Raises:
            ValueError: if it is for a file that could only be loaded as a LoRA; nothing has been written then.
        """
        if saver := _lora_saver():
            raise ValueError(
                f"diffusers' {saver} writes what only a plain LoRA can be loaded from, and this adapter is "
                f"{self.peft_type.value}. Write a LoRA with peft_reslora.save_as_lora(folder, model), which diffusers "
                "loads; to go on training, save get_peft_model_state_dict(model) and the config (save_pretrained)."
            )
        return super().to_dict()


def _lora_saver() -> str | None:
    """The name of the function that asks, if it is one of those."""
    frame = sys._getframe(2)
    for _ in range(_DEPTH):
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _LORA_SAVERS:
            return frame.f_code.co_name
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
