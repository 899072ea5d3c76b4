"""ResLoRA layers: PEFT's own LoRA layers, with the delta weight, norms and unmerging of ResLoRA.

PEFT's dispatch decides which LoRA layer a module gets; `as_reslora_layer` then changes that layer's class to the
subclass of the same name made here.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import transpose
from torch import nn

from peft_reslora.quantized import dequantised_weight, keep_bias, kept_copy, put_back, refuse_repacked
from peft_reslora.reslora.merge import SHORTCUT_PARTS, UNRECORDED, factor_sketch
from peft_reslora.reslora.variant import Chain, ResLoRAVariant

# PEFT's layers that ask `lora_variant` in their forward (read in 0.21.2). All others (AWQ, AQLM, EETQ, Megatron,
# TransformerEngine, embeddings, convolutions, attention, parameters) would train plain LoRA and are refused.
_VARIANT_AWARE = {
    "Linear": "peft.tuners.lora.layer",
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "Linear4bit": "peft.tuners.lora.bnb",
    "GPTQLoraLinear": "peft.tuners.lora.gptq",
    "HqqLoraLinear": "peft.tuners.lora.hqq",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao",
    "IncLoraLinear": "peft.tuners.lora.inc",
}


# What a layer holds by adapter besides the factors, in buffers of the adapter's checkpoint.
BUFFERS = ("lora_norm", *SHORTCUT_PARTS)


class Float32Buffers(BufferDict):
    """Buffers that follow the model to its device but keep their dtype when it is cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Buffers:
        dtypes = {name: buffer.dtype for name, buffer in self.items()}
        originals = dict(self.items())
        super()._apply(fn, recurse)
        for name, buffer in list(self.items()):
            if buffer.dtype != dtypes[name]:
                self[name] = originals[name].to(buffer.device)
        return self


class ResLoRALayer(LoraLayer if TYPE_CHECKING else object):  # type: ignore[misc]
    """What ResLoRA adds to one of PEFT's LoRA layers. Adapters without a chain here stay plain LoRA.

    At run time a plain class, since the class of an object can only be changed to one of the same layout.
    """

    lora_norm: BufferDict  # by adapter: the window of root mean squares, newest last
    lora_shortcut: BufferDict  # by adapter, where it has one: C_n (r, in_features), the shortcut's term from x_n
    lora_calibrated: BufferDict  # by adapter: the sketch of the factors for which C_n was fitted
    lora_annealed: BufferDict  # by adapter: the share t () of the shortcut whose place C_n has taken in the forward
    kept_base_weights: dict[str, torch.Tensor]  # by adapter: the base weight before it was merged
    kept_base_layer: list[nn.Module]  # while merged, where it is quantised: a copy of the base layer from before

    def chain_of(self, adapter_name: str) -> tuple[Chain, int] | None:
        variant = self.lora_variant.get(adapter_name)
        return (variant.chain, variant.position) if isinstance(variant, ResLoRAVariant) else None

    def link(self, adapter_name: str, chain: Chain, position: int) -> None:
        """Give the adapter its place in a chain; called after every injection."""
        self.lora_variant[adapter_name] = ResLoRAVariant(chain, position)
        if chain.config.shortcut != "block":
            device = self.lora_A[adapter_name].weight.device
            window = torch.full((chain.config.norm_window,), UNRECORDED, device=device, dtype=torch.float32)
            self.lora_norm[adapter_name] = window

    @torch.no_grad()
    def record_norm(self, adapter_name: str, x: torch.Tensor) -> None:
        """Append the root mean square of `x` to the adapter's window, while training with 'input_norm'.

        The mean over all entries, so that neither batch size nor length biases it; in float32, on the device.
        """
        chain = self.lora_variant[adapter_name].chain
        if not self.training or chain.config.merge_estimator != "input_norm" or x.numel() == 0:
            return
        window = self.lora_norm[adapter_name]
        norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) / math.sqrt(x.numel())
        window.copy_(torch.cat((window[1:], norm.reshape(1).float())))

    def store_calibration(self, adapter_name: str, shortcut: torch.Tensor) -> None:
        """Keep C_n, with a sketch of the factors that it belongs to."""
        A, B = self.lora_A[adapter_name].weight.detach(), self.lora_B[adapter_name].weight.detach()
        self.lora_shortcut[adapter_name] = shortcut.to(A.device, torch.float32)
        self.lora_calibrated[adapter_name] = factor_sketch(A, B).to(A.device)

    def anneal(self, adapter_name: str, estimate: torch.Tensor, share: float) -> None:
        """Let `estimate`, E_n, take the `share` t of the shortcut's place in the forward pass from now on."""
        device = self.lora_A[adapter_name].weight.device
        self.lora_shortcut[adapter_name] = estimate.to(device, torch.float32)
        self.lora_annealed[adapter_name] = torch.tensor(share, device=device)
        if adapter_name in self.lora_calibrated:
            del self.lora_calibrated[adapter_name]

    def merged_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A (R, in_features), B (out_features, R))` of the merged update B @ A, scaling included.

        Exact for 'block', by the config's `merge_estimator` for 'input' and 'middle'.

        Raises:
            ValueError: if the estimator lacks its data, or a factor is not finite.
        """
        place = self.chain_of(adapter_name)
        if place is None:
            raise ValueError(
                f"Adapter {adapter_name!r} is not a ResLoRA adapter on this layer, which has "
                f"{[name for name in self.lora_A if self.chain_of(name)]}."
            )
        chain, position = place
        return chain.merged_factors(position)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The merged delta weight in the base weight's own orientation and the adapter's dtype."""
        if self.chain_of(adapter) is None:
            return super().get_delta_weight(adapter)
        A, B = self.merged_factors(adapter)
        return transpose(B @ A, self.fan_in_fan_out).to(self.lora_B[adapter].weight.dtype)

    def add_delta_weight(self, weight: torch.Tensor, adapter_name: str, in_place: bool) -> torch.Tensor:
        """`weight` plus the merged delta weight, rounded once."""
        A, B = self.merged_factors(adapter_name)
        left, right = (A.t(), B.t()) if self.fan_in_fan_out else (B, A)
        if weight.dtype != left.dtype or weight.device != left.device:
            weight = weight if in_place else weight.clone()
            return weight.add_((left @ right).to(weight.device))
        return weight.addmm_(left, right) if in_place else torch.addmm(weight, left, right)

    def keep_base_weight(self, adapter_name: str) -> None:
        """Remember the weight before a merge, so that unmerging gives it back bit for bit.

        A merge writes a new tensor, so this costs one reference, and the memory of one weight while merged. Of
        quantised layers, `merge` keeps a copy.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        if type(self) is Linear and weight is not None and weight.is_floating_point():
            self.kept_base_weights[adapter_name] = weight.data

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT; a quantised layer is kept as it was before, so that unmerging gives it back bit for bit."""
        self._refuse_repacked()
        base_layer = self.get_base_layer()
        places = [self.chain_of(name) for name in adapter_names or self.active_adapters]
        keep = any(place is not None and place[0].keeps_base_weights for place in places)
        if type(self) is not Linear and keep and not self.merged:
            self.kept_base_layer.append(kept_copy(base_layer))
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        keep_bias(self.get_base_layer(), base_layer)

    def unmerge(self) -> None:
        """As in PEFT; a quantised layer is put back as it was, not subtracted from."""
        if not self.kept_base_layer:
            super().unmerge()
            return
        put_back(self.get_base_layer(), self.kept_base_layer.pop())
        self.merged_adapters.clear()

    def _refuse_repacked(self) -> None:
        places = (self.chain_of(adapter_name) for adapter_name in self.lora_A)
        name = next((place[0].names[place[1]] for place in places if place is not None), "without a name")
        refuse_repacked(self.get_base_layer(), name)

    def unmerged_base_weight(self) -> torch.Tensor:
        """W_n `(out_features, in_features)` without any adapter, dequantised."""
        self._refuse_repacked()
        if self.kept_base_layer or not self.merged_adapters:
            weight = dequantised_weight(*(self.kept_base_layer or [self.get_base_layer()]))
        elif self.merged_adapters[0] in self.kept_base_weights:
            weight = self.kept_base_weights[self.merged_adapters[0]]
        else:
            raise ValueError(
                f"Adapter {self.merged_adapters[0]!r} is already merged into a layer whose base weight was not kept, "
                "so merge_estimator='weight_norm' cannot be computed. Merge all layers in one call of merge_adapter "
                "or merge_and_unload."
            )
        return transpose(weight, self.fan_in_fan_out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `get_delta_weight` has the data it needs."""
        if self.chain_of(adapter_name) is None:
            return super().supports_lora_conversion(adapter_name)
        try:
            self.merged_factors(adapter_name)
        except ValueError:
            return False
        return True

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.kept_base_weights.pop(adapter_name, None)
        self.forget(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Leave the chain, and what was recorded in it, as if the adapter were new."""
        self.lora_variant.pop(adapter_name, None)
        for buffers in (getattr(self, name) for name in BUFFERS):
            if adapter_name in buffers:
                del buffers[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would cast a buffer to the base layer's dtype too; these stay in float32.
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for buffers in (getattr(self, name) for name in BUFFERS):
            if adapter_name in buffers and adapter_name in self.lora_A:
                weight = self.lora_A[adapter_name].weight
                if not weight.is_meta and not buffers[adapter_name].is_meta:
                    buffers[adapter_name] = buffers[adapter_name].to(weight.device)


class Linear(ResLoRALayer, lora.Linear):
    """`lora.Linear` with shortcuts; also for transformers' Conv1D."""


def _subclass(name: str) -> type[ResLoRALayer]:
    """The ResLoRA layer for PEFT's layer class `name`."""
    if name not in globals():
        attributes: dict[str, Any] = {"__module__": __name__}
        if name == "HqqLoraLinear":  # PEFT's own ignores variants in mixed batches (0.21.2)
            attributes["_mixed_batch_forward"] = LoraLayer._mixed_batch_forward
        base = getattr(import_module(_VARIANT_AWARE[name]), name)
        globals()[name] = type(name, (ResLoRALayer, base), attributes)
    return globals()[name]


def __getattr__(name: str) -> type[ResLoRALayer]:
    """Makes the subclasses of quantised layers importable, so that models with them can be pickled."""
    if name in _VARIANT_AWARE:
        return _subclass(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def as_reslora_layer(module: nn.Module, name: str) -> None:
    """Turn one of PEFT's LoRA layers into the ResLoRA layer of the same kind, in place.

    Raises:
        ValueError: if the layer's forward does not ask for a variant and would silently train plain LoRA.
    """
    if isinstance(module, ResLoRALayer):
        return
    kind = type(module)
    if _VARIANT_AWARE.get(kind.__name__) != kind.__module__:
        raise ValueError(
            f"ResLoRA cannot be applied to layer {name!r}: PEFT adapts it with {kind.__module__}.{kind.__name__}, "
            f"which would train plain LoRA. Supported are {', '.join(_VARIANT_AWARE)}. Exclude the layer with "
            "exclude_modules, or use LoraConfig."
        )
    module.__class__ = _subclass(kind.__name__)
    for buffers in BUFFERS:
        setattr(module, buffers, Float32Buffers(persistent=True))
    module.__dict__["kept_base_weights"] = {}  # plain, not a submodule
    module.__dict__["kept_base_layer"] = []
