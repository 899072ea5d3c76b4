"""The ResLoRA layer over a parameter, which `target_parameters` adapts: fused experts and others.

PEFT's `ParamWrapper` (read in 0.21.2) adds the update to the parameter while the module around it runs, and asks
`get_delta_factors` or `get_delta_weight` for it; a `lora_variant` it never asks. For expert e of layer n of a chain
the update is that of shortcut 'block' (ResLoRA, arXiv 2402.18039, Eq. 3):

    the sum of the s_k B_k^e A_k^e over layer n and the earlier ones that feed it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from peft_reslora.reslora.blocks.experts import ExpertsBlock
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.factor_sharing import terms, way_to_factors
from peft_reslora.reslora.layer import ResLoRALayer, become
from peft_reslora.shared.host import is_tensor_parallel, is_transposed_parameter, own_parameter
from peft_reslora.shared.names import parameter_path
from peft_reslora.shared.offloading import offload_hook
from peft_reslora.shared.tensors import NOT_HERE, is_readable


class ParamWrapper(ResLoRALayer, lora.layer.ParamWrapper):
    """PEFT's layer of the same name, which it looks for, with shortcut 'block'."""

    is_plain = True
    own_kind = ExpertsBlock

    def weight_name(self, name: str) -> str:
        return parameter_path(name, self.parameter_name)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """As in PEFT.

        Raises:
            ValueError: for an adapter of another method, which would have no place in a chain.
        """
        if not isinstance(config, ResLoRAConfig):
            raise ValueError(
                f"Layer {self.layer_name!r}, a parameter, has an adapter of ResLoRA, and one of "
                f"{type(config).__name__} cannot be added there. Use ResLoRAConfig, or two copies of the model."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def computation(self, adapter_name: str) -> str:
        """Also which parameter: of several, a file tells only how their layers stand inside each other."""
        turned = ", transposed" if is_transposed_parameter(self) else ""
        return f"{super().computation(adapter_name)}, {self.parameter_name} of {self.num_experts} experts{turned}"

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """L, R and s of the whole sum, s L R, in the parameter's dtype; in a forward pass, with gradients."""
        weight = self._readable_parameter()
        left, right, scaling = self._factors_of_sum(adapter_name, weight)
        return left.to(weight.dtype), right.to(weight.dtype), scaling

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The whole sum, of the parameter's shape; in a forward pass, with gradients."""
        weight = self._readable_parameter()
        left, right, scaling = self._factors_of_sum(adapter_name, weight)
        with torch.autocast(weight.device.type, enabled=False):
            delta = (left @ right * scaling).view(weight.shape)
        # PEFT adds to a parameter of 8 bits in the update's own precision, and rounds the sum.
        return delta if weight.element_size() < 2 else delta.to(weight.dtype)

    def _factors_of_sum(self, adapter_name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        variant: Any = self.lora_variant[adapter_name]
        chain, position = variant.chain, variant.position
        self.note_call(adapter_name)
        way = way_to_factors(chain, position, weight)
        return chain.block(position).side_by_side(terms(chain, position, way, weight.device))

    def _readable_parameter(self) -> torch.Tensor:
        """The parameter, to which the update is added before the module that holds it is called.

        Raises:
            RuntimeError: if it is only then made whole, or computed from others.
        """
        base_layer = self.get_base_layer()
        weight = own_parameter(base_layer, self.parameter_name)
        if weight is None or not is_readable(weight) or is_tensor_parallel(base_layer):
            why = "computed from other tensors" if weight is None else NOT_HERE
            raise RuntimeError(
                f"The parameter of layer {self.layer_name!r}, to which adapters are added before its module is "
                f"called, is {why}. Keep it whole on a device (no offloading, no tensor parallelism, no "
                "parametrization; FSDP2 on whole blocks), or leave it out of target_parameters."
            )
        return weight

    def check_mergeable(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """As of other layers; an offloaded parameter is refused, since PEFT (0.21.2), which loads it before a merge,
        forgets what is merged where several layers stand around one module."""
        if adapter_names and offload_hook(self.get_base_layer()) is not None:
            raise ValueError(
                f"No adapter can be merged into layer {self.layer_name!r}, a parameter that is offloaded. Load the "
                "base model whole on a device, such as the CPU, and merge there."
            )
        super().check_mergeable(adapter_names, safe_merge)

    def _merge_into_base(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        # PEFT's own (0.21.2) writes into memory that others may share.
        base_layer = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.r:
                held = getattr(base_layer, self.parameter_name)
                in_place = any(id(self) in chain.in_place for chain in self._chains([name]))
                held.data = self.add_delta_weight(held.data, name, in_place)
                self.merged_adapters.append(name)

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as the parameter holds it, as `(experts, out_features, in_features)`."""
        experts = weight if weight.ndim == 3 else weight.unsqueeze(0)
        return experts.mT if is_transposed_parameter(self) else experts

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A weight `(experts, out_features, in_features)` as the parameter holds it."""
        return (matrix.mT if is_transposed_parameter(self) else matrix).view(self.get_param().shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # of linear layers only


def as_parameter_layer(module: nn.Module) -> None:
    """Turn PEFT's layer over a parameter into ours, in place."""
    if not isinstance(module, ResLoRALayer):
        become(module, ParamWrapper)
