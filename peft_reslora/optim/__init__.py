"""Optimizers over pairs of factors, for adapters whose update is s B A: LoRA-Pro and LoRA-RITE.

    pairs = factor_pairs(model)
    optimizer = LoRAPro([{"pairs": pairs}, {"params": remaining_parameters(model, pairs)}], lr=1e-4)

PEFT's own optimizers find factors by their names, and take these adapters as follows (read in PEFT 0.21.2):

- `create_loraplus_optimizer` (LoRA+): each B of a ResLoRA adapter gets the learning rate times the ratio, each A the
  learning rate. MoRA has no B: its square matrices get the learning rate, and the ratio does nothing.
- `create_lorafa_optimizer` (LoRA-FA): freezes each A and takes (1 / s^2) g_B (A A^T)^-1 as the gradient of B, the one
  that brings s g_B A nearest to the gradient of the update, see `LoRAPro` for what that is. Right for the shortcuts
  'input' and 'block'. Not for 'middle', where B_n multiplies sum_k A_{n-k} x_{n-k}: the nearest is then
  (1 / s^2) g_B (sum_k A_{n-k} A_{n-k}^T)^-1, and PEFT's is larger, by about the number of blocks that take part.
  It still descends; take a learning rate as much smaller, or LoRA+. On MoRA it is AdamW.
"""

from peft_reslora.optim.lora_pro import LoRAPro
from peft_reslora.optim.lora_rite import LoRARite
from peft_reslora.optim.pairs import FactorPair, factor_pairs, remaining_parameters

__all__ = ["FactorPair", "LoRAPro", "LoRARite", "factor_pairs", "remaining_parameters"]
