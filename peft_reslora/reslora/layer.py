"""ResLoRA layers: PEFT's own LoRA layers, with the delta weight, norms and unmerging of ResLoRA.

PEFT's dispatch decides which LoRA layer a module gets; `as_reslora_layer` then changes that layer's class to the
subclass of the same name made here.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import nn

from peft_reslora.reslora.attention import attend, refuse_wrapped, weight_with_updates
from peft_reslora.reslora.blocks import PARAMETER_NAMES, LinearBlock
from peft_reslora.reslora.blocks.convolution import gather
from peft_reslora.reslora.blocks.embedding import EmbeddingBlock
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.merging.estimators import SHORTCUT_PARTS, UNRECORDED, factor_sketch
from peft_reslora.reslora.products import HALVES
from peft_reslora.reslora.variant import ResLoRAVariant
from peft_reslora.shared.base_weights import (
    computed_weight,
    give_back_weight,
    give_up,
    own_weight,
    refuse_given_up,
    refuse_overflow,
    refuse_unwritable,
)
from peft_reslora.shared.host import BufferDict, is_transformed, own_parameter, stand_in, unseen_by_modes
from peft_reslora.shared.names import OUT_PROJECTION
from peft_reslora.shared.offloading import held_tensor, onloaded
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.quantized import dequantized_weight, keep_bias, kept_copy, put_back, refuse_repacked
from peft_reslora.shared.stamps import StampedLayer
from peft_reslora.shared.tensors import NOT_HERE, is_readable, restore, stored

# PEFT's layers that ask `lora_variant` in their forward (read in 0.21.2), and attention, whose forward is our own.
# Those over parameters are in `parameter_layer.py`. All others (AWQ, AQLM, EETQ, Megatron, TransformerEngine) would
# train plain LoRA and are refused.
_VARIANT_AWARE = {
    "Linear": "peft.tuners.lora.layer",
    "Conv1d": "peft.tuners.lora.layer",
    "Conv2d": "peft.tuners.lora.layer",
    "Conv3d": "peft.tuners.lora.layer",
    "Embedding": "peft.tuners.lora.layer",
    "MultiheadAttention": "peft.tuners.lora.layer",
    "Linear8bitLt": "peft.tuners.lora.bnb",
    "Linear4bit": "peft.tuners.lora.bnb",
    "GPTQLoraLinear": "peft.tuners.lora.gptq",
    "HqqLoraLinear": "peft.tuners.lora.hqq",
    "TorchaoLoraLinear": "peft.tuners.lora.torchao",
    "IncLoraLinear": "peft.tuners.lora.inc",
}


_STAMP = "lora_magnitude_vector"

# What a layer holds by adapter besides the factors, in buffers of the adapter's checkpoint.
BUFFERS = ("lora_norm", *SHORTCUT_PARTS)


class Float32Buffers(BufferDict):
    """Buffers that follow the model to its device but keep their dtype when it is cast.

    `empty` is what they hold when nothing has been recorded or loaded, and again after `to_empty`, which keeps no
    numbers.
    """

    def __init__(self, empty: float = math.nan) -> None:
        super().__init__(persistent=True)
        self.empty = empty

    def _apply(self, fn: Any, recurse: bool = True) -> Float32Buffers:
        if not len(self):
            return self
        originals = dict(self.items())
        keeps_numbers = _keeps_numbers(fn)
        super()._apply(fn, recurse)
        for name, buffer in list(self.items()):
            original = originals[name]
            if not buffer.is_meta and (original.is_meta or not keeps_numbers):
                self[name] = torch.full_like(buffer, self.empty, dtype=original.dtype)
            elif buffer.dtype != original.dtype:
                self[name] = original.to(buffer.device)
        return self


def _keeps_numbers(fn: Any) -> bool:
    """Whether what is applied to a module's tensors keeps their numbers, as a move does and `to_empty` does not.

    Tried on ones and zeros that no earlier call had, so that they are in no memory that is handed out again.
    """
    bits = Random(next(_calls)).getrandbits(64)
    probe = torch.tensor([float(bits >> n & 1) for n in range(64)])
    result = fn(probe.clone())
    return result.is_meta or torch.equal(result.cpu().float(), probe)


_calls = itertools.count()


class ResLoRALayer(StampedLayer, LoraLayer if TYPE_CHECKING else object):  # type: ignore[misc]
    """What ResLoRA adds to one of PEFT's LoRA layers. Adapters without a chain here stay plain LoRA.

    At run time a plain class, since the class of an object can only be changed to one of the same layout.
    """

    lora_norm: BufferDict  # by adapter: the window of root mean squares, newest last
    lora_shortcut: BufferDict  # by adapter, where it has one: C_n (r, in_features), the shortcut's term from x_n
    lora_calibrated: BufferDict  # by adapter: the sketch of the factors for which C_n was fitted
    lora_annealed: BufferDict  # by adapter: the share t () of the shortcut whose place C_n has taken in the forward
    # While merged: the base layer's weight from before; where it is quantized, a copy of the base layer.
    kept_base: list[nn.Parameter | nn.Module]
    is_plain: ClassVar[bool] = False  # whether the base layer's weight is plain numbers, into which a merge can write
    is_linear: ClassVar[bool] = False  # whether it is that of a linear layer besides
    own_kind: ClassVar[type[LinearBlock] | None] = None  # of its blocks, where neither config nor base layer tell
    parameter_name: str = "weight"  # what of the base layer is adapted

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles: the copied layer enters itself into the copies of its chains."""
        super().__setstate__(state)  # of nn.Module
        for variant in self.lora_variant.values():
            if isinstance(variant, ResLoRAVariant):
                variant.chain.enter(variant.position, self)

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in PEFT, and with one adapter on a linear layer, where there is a shorter way, in fewer steps than there.

        x may come as `input`, the name that torch's layers have for it: PEFT's (0.21.2) fail on diffusers' motion
        modules, which call `proj_in(input=...)` (0.42).
        """
        if x is None and "input" in kwargs:
            x = kwargs.pop("input")
        if not (args or kwargs or self.merged_adapters or self.disable_adapters):
            names = self.active_adapters
            variant = self.lora_variant.get(names[0]) if self.is_linear and len(names) == 1 else None
            if isinstance(variant, ResLoRAVariant) and (output := variant.forward_alone(self, x)) is not None:
                return output
        return super().forward(x, *args, **kwargs)

    # DoRA, of which these layers have none, keeps its magnitudes there (read in 0.21.2). A program that takes the file
    # for a LoRA's finds in their place a stamp, which fits no layer; if it knows no DoRA, a name that it refuses.
    stamp_name = _STAMP
    part_names = (*PARAMETER_NAMES, *BUFFERS)
    adapter_layer_names: tuple[str, ...] = tuple(
        dict.fromkeys(name for name in (*LoraLayer.adapter_layer_names, *PARAMETER_NAMES) if name != _STAMP)
    )
    other_param_names: tuple[str, ...] = (*LoraLayer.other_param_names, _STAMP)

    def weight_name(self, name: str) -> str:
        """The name in the model of what is adapted, by the layer's own."""
        return f"{name}.{self.parameter_name}"

    def chain_of(self, adapter_name: str) -> tuple[Chain, int] | None:
        variant = self.lora_variant.get(adapter_name)
        return (variant.chain, variant.position) if isinstance(variant, ResLoRAVariant) else None

    def block_of(self, adapter_name: str) -> LinearBlock:
        """The adapter on this layer, which has a place in a chain."""
        return self.lora_variant[adapter_name].chain.kind(self, adapter_name)

    def resolve_lora_variant(self, **kwargs: Any) -> None:
        """PEFT's own variants are not used: blocks know what a config asks for."""

    def set_scale(self, adapter: str, scale: float) -> None:
        super().set_scale(adapter, scale)
        place = self.chain_of(adapter)
        if place is not None and adapter in self.scaling:
            config, alpha = place[0].config, self.lora_alpha[adapter]
            self.scaling[adapter] = scale * config.scaling(self.r[adapter], alpha)

    def unscale_layer(self, scale: float | None = None) -> None:
        super().unscale_layer(scale)
        for adapter in self.active_adapters if scale is None else ():
            self.set_scale(adapter, 1.0)

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """As in PEFT, unless the adapter itself sees to it (`products.py`)."""
        return x if self._takes_halves(x, dtype) else super()._cast_input_dtype(x, dtype)

    def cast_to_adapter(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As PEFT casts an input to the dtype of an adapter."""
        return super()._cast_input_dtype(x, dtype)

    def _takes_halves(self, x: Any, dtype: torch.dtype) -> bool:
        """Whether an input in half precision is left to the only adapter that runs."""
        if x is None or x.dtype == dtype or dtype != torch.float32 or x.dtype not in HALVES:
            return False
        if torch.compiler.is_compiling() or len(self.active_adapters) != 1:
            return False
        return self.chain_of(self.active_adapters[0]) is not None

    def link(self, adapter_name: str, chain: Chain, position: int) -> None:
        """Give the adapter its place in a chain; called after every injection."""
        self.lora_variant[adapter_name] = ResLoRAVariant(chain, position)
        self.block_of(adapter_name).start()
        self.set_scale(adapter_name, 1.0)
        if chain.config.shortcut != "block":
            device = self.block_of(adapter_name).weights[0].device
            window = torch.full((chain.config.norm_window,), UNRECORDED, device=device, dtype=torch.float32)
            self.lora_norm[adapter_name] = window
        awaited = chain.config.estimate if chain.config.shortcut != "block" else None
        if position == 0 and (awaited == "annealed" or len(chain) == 1):
            awaited = None  # the first layer's merge is exact; a calibration notes its factors
        if awaited is not None:
            self.make_room_for_estimate(adapter_name, awaited)
        if chain.config.stamped or awaited is not None:
            self.await_stamp(adapter_name)

    def make_room_for_estimate(self, adapter_name: str, estimate: str) -> None:
        """Buffers for an estimate that is to be loaded, without numbers until then."""
        weight, _ = self.block_of(adapter_name).weights
        shape: tuple[int, ...] = self.block_of(adapter_name).estimate_shape
        shapes: dict[str, tuple[int, ...]] = {
            "lora_shortcut": shape,
            "lora_calibrated": (2 * shape[0],),
            "lora_annealed": (),
        }
        del shapes["lora_calibrated" if estimate == "annealed" else "lora_annealed"]
        place = self.chain_of(adapter_name)
        if place is not None and place[1] == 0:
            del shapes["lora_shortcut"]
        for name, shape in shapes.items():
            buffers: Float32Buffers = getattr(self, name)
            buffers[adapter_name] = torch.full(shape, buffers.empty, device=weight.device, dtype=torch.float32)

    def stamped_parts(self, adapter_name: str) -> dict[str, torch.Tensor | None]:
        return self.block_of(adapter_name).tensors() | {
            name: stored(getattr(self, name), adapter_name) for name in BUFFERS
        }

    def computation(self, adapter_name: str) -> str:
        place = self.chain_of(adapter_name)
        if place is None:
            return "no shortcut"
        chain, position = place
        # `set_scale` is not saved
        return chain.config.computation(self.r[adapter_name], self.lora_alpha[adapter_name], position)

    def layer_title(self, adapter_name: str) -> str:
        place = self.chain_of(adapter_name)
        return "without a name" if place is None else place[0].names[place[1]]

    def awaits_estimate(self, adapter_name: str) -> bool:
        share = stored(self.lora_annealed, adapter_name)
        return share is not None and not share.is_meta and bool(share.isnan())

    def check_loaded(self, adapter_name: str) -> None:
        super().check_loaded(adapter_name)
        sketch = stored(self.lora_calibrated, adapter_name)
        if sketch is not None and not sketch.is_meta and sketch.isnan().all():  # a calibration that was not loaded
            for buffers in (self.lora_shortcut, self.lora_calibrated):
                restore(buffers, adapter_name, None)

    @torch.no_grad()
    def record_norm(self, adapter_name: str, x: torch.Tensor) -> None:
        """Append the root mean square of `x` to the adapter's window, while training with 'input_norm'.

        The mean over all entries, so that neither batch size nor length biases it; in float32, on the device.
        """
        chain = self.lora_variant[adapter_name].chain
        if not self.training or chain.config.merge_estimator != "input_norm" or x.numel() == 0 or is_transformed():
            return
        with unseen_by_modes():
            window = self.lora_norm[adapter_name]
            norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))
            mean = norm.float().mul_(1 / math.sqrt(x.numel())).view(1)
            window.copy_(torch.cat((window[1:], mean)))

    def store_calibration(self, adapter_name: str, shortcut: torch.Tensor | None) -> None:
        """Keep C_n, if the layer has a shortcut, with a sketch of the factors that the calibration belongs to."""
        A, B = self.block_of(adapter_name).factors(self.layer_name, "Load the model without sharding for this.")
        if shortcut is not None:
            self.lora_shortcut[adapter_name] = shortcut.to(A.device, torch.float32)
        self.lora_calibrated[adapter_name] = factor_sketch(A, B).to(A.device)
        self.lora_variant[adapter_name].chain.config.estimate = "calibrated"

    def anneal(self, adapter_name: str, estimate: torch.Tensor, share: float) -> None:
        """Keep `estimate` as the C_n that takes the `share` t of the shortcut's place in the forward from now on."""
        device = self.block_of(adapter_name).weights[0].device
        self.lora_shortcut[adapter_name] = estimate.to(device, torch.float32)
        self.lora_annealed[adapter_name] = torch.tensor(share, device=device, dtype=torch.float32)
        if adapter_name in self.lora_calibrated:
            del self.lora_calibrated[adapter_name]
        self.lora_variant[adapter_name].chain.config.estimate = "annealed"

    @full_precision()
    def merged_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A (R, in_features), B (out_features, R))` of the merged update B @ A, scaling included.

        Exact for 'block', by the config's `merge_estimator` for 'input' and 'middle'.

        Raises:
            ValueError: if the estimator lacks its data, a factor is not finite, or the update has no low rank.
        """
        if self.chain_of(adapter_name) is not None and not self.block_of(adapter_name).adds_up:
            raise ValueError(
                f"Adapter {adapter_name!r} has use_dora=True: what it adds to the weight of layer "
                f"{self.layer_name!r} is no matrix of low rank. Merge it with merge_and_unload()."
            )
        return self._factors_of_merge(adapter_name)

    @full_precision()
    def _factors_of_merge(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        place = self.chain_of(adapter_name)
        if place is None:
            raise ValueError(
                f"Adapter {adapter_name!r} is not a ResLoRA adapter on this layer, which has "
                f"{[name for name in self.r if self.chain_of(name)]}."
            )
        chain, position = place
        return chain.merged_factors(position)

    @full_precision()
    def dora_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A `(R, in_features)`, B `(out_features, R)`, scaling included, and m `(out_features,)`, as PEFT's DoRA has
        them: of an adapter with use_dora.

        Raises:
            ValueError: if a factor is not finite, or a row of the merged weight is zero.
        """
        A, B = self._factors_of_merge(adapter_name)
        return A, B, self.block_of(adapter_name).magnitude_for_peft(A, B)  # type: ignore[attr-defined]

    @full_precision()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The merged delta weight in the base weight's own orientation and the adapter's dtype."""
        return self.delta_of_merge(adapter)

    def delta_of_merge(self, adapter: str) -> torch.Tensor:
        """What a merge of the adapter adds to the base weight."""
        if self.chain_of(adapter) is None:
            return super().get_delta_weight(adapter)
        block = self.block_of(adapter)
        delta = block.delta(*self._factors_of_merge(adapter))
        return self.as_weight(delta).to(block.weights[1].dtype)

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of the base layer's shape as a matrix `(out_features, in_features)`."""
        return transpose(weight, self.fan_in_fan_out)

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix `(out_features, in_features)` in the shape of the base layer's weight."""
        return transpose(matrix, self.fan_in_fan_out)

    def add_delta_weight(self, weight: torch.Tensor, adapter_name: str, in_place: bool = False) -> torch.Tensor:
        """`weight` plus the merged delta weight, rounded once."""
        A, B = self._factors_of_merge(adapter_name)
        return self.block_of(adapter_name).merged(weight, A, B, in_place)

    @full_precision()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT, but refused before anything is changed, and undone by `unmerge` bit for bit."""
        before, kept_before = list(self.merged_adapters), list(self.kept_base)
        names = self.adapters_to_merge(adapter_names)
        if not any(chain.merges_checked for chain in self._chains(names)):
            self.check_mergeable(names, safe_merge)
        base_layer = self.get_base_layer()
        with onloaded(base_layer):
            kept = self._keep_base(names)
            self.kept_base += [] if before else kept  # one adapter may ask for the weight from before another's merge
            try:
                self._merge_into_base(safe_merge, adapter_names)
            except BaseException:
                self._put_back(kept)
                self.merged_adapters[:], self.kept_base[:] = before, kept_before
                if any(id(self) in chain.in_place for chain in self._chains(names)) and not safe_merge:
                    give_up(self, self.layer_name)
                raise
            keep_bias(self.get_base_layer(), base_layer)
        if not self._keeps_base(names):
            self.kept_base[:] = kept_before

    def _merge_into_base(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    @full_precision()
    def unmerge(self) -> None:
        """As in PEFT, but the base layer is put back as it was, not subtracted from."""
        with onloaded(self.get_base_layer()):
            if not self.kept_base:
                super().unmerge()
                return
            self._put_back(self.kept_base)
        self.kept_base.clear()
        self.merged_adapters.clear()

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Those of the adapters, the active ones by default, that the layer has and that are not merged into it."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in dict.fromkeys(names) if name in self.r and name not in self.merged_adapters]

    def check_mergeable(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge that would be lost, or that would leave NaN or inf, while nothing has been changed.

        Raises:
            ValueError: naming the layer, and the adapter whose update does not fit.
            TypeError: if the base weight cannot be read as plain numbers.
        """
        name, base_layer = self.layer_name, self.get_base_layer()
        refuse_given_up(self, name)
        refuse_repacked(base_layer, name)
        if adapter_names and self.is_plain:
            refuse_unwritable(base_layer, name, self.parameter_name)
        if any(self.lora_bias.get(adapter_name) for adapter_name in adapter_names):
            raise ValueError(f"An adapter with lora_bias=True cannot be merged into the ResLoRA layer {name!r}.")
        bounds = {adapter_name: self._largest_update(adapter_name) for adapter_name in adapter_names}
        # Of a quantized weight, take the narrowest of the dtypes into which it can be dequantized.
        dtype = getattr(base_layer, self.parameter_name).dtype if self.is_plain and adapter_names else torch.float16
        deltas = {n: partial(self.delta_of_merge, n) for n in adapter_names}
        refuse_overflow(self._base_weight, dtype, deltas, bounds, name, safe_merge)

    def _largest_update(self, adapter_name: str) -> float:
        """A bound on the entries of the delta weight: |b_i . a_j| <= |b_i| |a_j|."""
        place = self.chain_of(adapter_name)
        if place is None:
            return float(self.delta_of_merge(adapter_name).abs().max())
        return self.block_of(adapter_name).largest_entry(*place[0].merge().factors(place[1]))

    def _keeps_base(self, adapter_names: Sequence[str]) -> bool:
        return all(chain.keeps_base_weights for chain in self._chains(adapter_names))

    def _adds_up(self, adapter_names: Iterable[str]) -> bool:
        return all(chain.kind.adds_up for chain in self._chains(adapter_names))

    def _chains(self, adapter_names: Iterable[str]) -> list[Chain]:
        return [place[0] for place in map(self.chain_of, adapter_names) if place is not None]

    def _keep_base(self, adapter_names: Sequence[str]) -> list[nn.Parameter | nn.Module]:
        """What `_put_back` needs; a plain base layer gets a weight of its own to merge into."""
        base_layer = self.get_base_layer()
        if not adapter_names:
            return []
        if not self.is_plain:
            asked_for = len(adapter_names) > 1 and not self._adds_up(adapter_names)
            return [kept_copy(base_layer)] if asked_for or self._keeps_base(adapter_names) else []
        held = own_weight(base_layer, self.parameter_name)
        if any(self.chain_of(name) is None for name in adapter_names):  # PEFT writes plain LoRA into the weight itself
            base_layer.weight.data = base_layer.weight.data.clone()
        return [held]

    def _put_back(self, kept: Sequence[nn.Parameter | nn.Module]) -> None:
        for base in kept:
            if isinstance(base, nn.Module):
                put_back(self.get_base_layer(), base)
            else:
                give_back_weight(self.get_base_layer(), base, self.parameter_name)

    @property
    def layer_name(self) -> str:
        """For messages: the layer's name in the base model."""
        places = map(self.chain_of, self.r)
        return next((place[0].names[place[1]] for place in places if place is not None), "without a name")

    def _base_weight(self) -> torch.Tensor:
        """The base layer's weight as it is now, in its own orientation, dequantized or computed."""
        base_layer = self.get_base_layer()
        if not self.is_plain:
            return dequantized_weight(base_layer)
        if own_parameter(base_layer, self.parameter_name) is not None:
            return held_tensor(base_layer, self.parameter_name).detach()
        return transpose(computed_weight(base_layer), self.fan_in_fan_out)

    @full_precision()
    def unmerged_base_weight(self) -> torch.Tensor:
        """W_n `(out_features, in_features)` without any adapter, for merging."""
        return self.as_matrix(self.frozen_weight())

    def frozen_weight(self) -> torch.Tensor:
        """The base layer's weight without any adapter, in its own orientation, dequantized."""
        refuse_repacked(self.get_base_layer(), self.layer_name)
        if not self.merged_adapters:
            weight = self._base_weight()
        elif self.kept_base:
            kept = self.kept_base[0]
            weight = dequantized_weight(kept) if isinstance(kept, nn.Module) else kept.detach()
        else:
            raise ValueError(
                f"Adapter {self.merged_adapters[0]!r} is already merged into layer {self.layer_name!r}, whose base "
                "weight was not kept, so merge_estimator='weight_norm' cannot be computed. Merge all layers in one "
                "call of merge_adapter or merge_and_unload."
            )
        return weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `get_delta_weight` has the data it needs."""
        if self.chain_of(adapter_name) is None:
            return super().supports_lora_conversion(adapter_name)
        try:
            self._factors_of_merge(adapter_name)
        except ValueError:
            return False
        return True

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            warnings.warn(
                f"Adapter {adapter_name!r} is merged into layer {self.layer_name!r}, which is unmerged to delete it.",
                stacklevel=2,
            )
            self.unmerge()
        super().delete_adapter(adapter_name)
        self.forget(adapter_name)

    def forget(self, adapter_name: str) -> None:
        """Leave the chain, and what was recorded in it, as if the adapter were new."""
        self.lora_variant.pop(adapter_name, None)
        self.forget_stamp(adapter_name)
        self.called_adapters.discard(adapter_name)
        self.arrivals.pop(adapter_name, None)
        for buffers in (getattr(self, name) for name in BUFFERS):
            if adapter_name in buffers:
                del buffers[adapter_name]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would cast a buffer to the base layer's dtype too; these stay in float32.
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for buffers in (getattr(self, name) for name in BUFFERS):
            if adapter_name in buffers and self.chain_of(adapter_name) is not None:
                weight, _ = self.block_of(adapter_name).weights
                if not weight.is_meta and not buffers[adapter_name].is_meta:
                    buffers[adapter_name] = buffers[adapter_name].to(weight.device)


class Linear(ResLoRALayer, lora.Linear):
    """`lora.Linear` with shortcuts; also for transformers' Conv1D."""

    is_plain = True
    is_linear = True


class Convolution(ResLoRALayer):
    """PEFT's layers over convolutions with shortcuts."""

    is_plain = True

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A kernel `(out, in / groups, *size)` as a matrix `(out, in * positions)`, zero between groups."""
        groups = self.get_base_layer().groups
        return torch.block_diag(*weight.flatten(1).chunk(groups)) if groups > 1 else weight.flatten(1)

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        base_layer = self.get_base_layer()
        size = (base_layer.in_channels // base_layer.groups, *base_layer.kernel_size)
        return gather(matrix, base_layer.groups).unflatten(1, size)

    def _merge_into_base(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        base_layer, names = self.get_base_layer(), self.adapters_to_merge(adapter_names)
        if base_layer.groups == 1 or any(self.chain_of(name) is None for name in names):
            return super()._merge_into_base(safe_merge, adapter_names)
        # PEFT merges nothing into groups (0.21.2), since its own A mixes them; it warns if there is nothing to do.
        for name in check_adapters_to_merge(self, adapter_names):
            base_layer.weight.data = self.add_delta_weight(base_layer.weight.data, name)
            self.merged_adapters.append(name)
        return None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # of linear layers only


class Conv1d(Convolution, lora.layer.Conv1d):
    """`nn.Conv1d` with shortcuts."""


class Conv2d(Convolution, lora.layer.Conv2d):
    """`nn.Conv2d` with shortcuts."""


class Conv3d(Convolution, lora.layer.Conv3d):
    """`nn.Conv3d` with shortcuts."""


class Embedding(ResLoRALayer, lora.layer.Embedding):
    """`nn.Embedding` with shortcut 'block'."""

    is_plain = True

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t()

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """As in PEFT, which ignores variants here (0.21.2).

        Raises:
            ValueError: if one of the adapters takes from another layer.
        """
        places = {name: self.chain_of(name) for name in adapter_names}
        if linked := [name for name, place in places.items() if place is not None and place[1] > 0]:
            raise ValueError(
                f"Adapter {linked[0]!r} links embedding {self.layer_name!r} to another, which batches with several "
                "adapters (adapter_names) cannot have. Use set_adapter, one adapter at a time."
            )
        if other := [n for n, place in places.items() if place is not None and place[0].kind is not EmbeddingBlock]:
            raise ValueError(
                f"Adapter {other[0]!r} is no plain LoRA on embedding {self.layer_name!r} "
                f"({type(self.block_of(other[0])).__name__}), but batches with several adapters (adapter_names) would "
                "compute one. Use set_adapter, one adapter at a time."
            )
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # of linear layers only


class OutProjection(Linear):
    """The blocks of an attention's out_proj.weight, which the attention adds to it; nothing else asks this layer."""

    def weight_name(self, name: str) -> str:
        return super().weight_name(name.removesuffix(OUT_PROJECTION) + ".out_proj")

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the weight that it has now."""
        return self.base_layer(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As in PEFT, whose loops over all layers come by again when the attention has seen to it."""
        if self.adapters_to_merge(adapter_names):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        if self.merged:
            super().unmerge()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False


class MultiheadAttention(ResLoRALayer, lora.layer.MultiheadAttention):
    """`nn.MultiheadAttention` with shortcut 'block': the base's own forward, with W + U in place of W (Eq. 3).

    PEFT's (0.21.2) writes the updates into the base's weights in each forward pass and takes them out again, that of
    out_proj twice. Nothing is written here (`attention.py`). Whoever reads `in_proj_weight` and `out_proj` past the
    forward, as torch's fast path of a TransformerEncoderLayer does, reads W + U as well.
    """

    is_plain = True
    parameter_name = "in_proj_weight"
    fan_in_fan_out = False

    @property
    def out_projection(self) -> Any:
        """PEFT's layer over out_proj, which holds the blocks of its weight."""
        base_layer: Any = self.get_base_layer()
        return base_layer.out_proj

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's, with the updates of the active adapters."""
        self._check_forward_args(None, *args, **kwargs)
        if (adapters := self._running()) is None:
            return self.base_layer(*args, **kwargs)
        attention: Any = self.base_layer
        refuse_wrapped(attention, self.layer_name)
        in_proj_weight = weight_with_updates(self, adapters, in_own_pass=True)
        out_proj_weight = weight_with_updates(self.out_projection, adapters, in_own_pass=True)
        return attend(attention, in_proj_weight, out_proj_weight, args, kwargs)

    def _running(self) -> list[str] | None:
        """The adapters whose updates are to be added; None where the base's weights are as they are to be.

        Raises:
            ValueError: if out_proj has other adapters active.
        """
        out_proj = self.out_projection
        if self.disable_adapters and (self.merged or out_proj.merged):
            self.unmerge()
        if out_proj.active_adapters != self.active_adapters:
            raise ValueError(
                f"Attention {self.layer_name!r} has the active adapters {self.active_adapters}, and its out_proj "
                f"{out_proj.active_adapters}: set them on the model (set_adapter), or on both."
            )
        names = [name for name in self.active_adapters if name in self.lora_A]
        return None if self.disable_adapters or not names or (self.merged and out_proj.merged) else names

    @property
    def in_proj_weight(self) -> Any:
        base_layer: Any = self.get_base_layer()
        if (adapters := self._running()) is None:
            return base_layer.in_proj_weight
        return weight_with_updates(self, adapters, in_own_pass=False)

    @property
    def out_proj(self) -> nn.Module:
        layer = self.out_projection
        if (adapters := self._running()) is None:
            return layer.get_base_layer()
        return stand_in(layer.get_base_layer(), weight=weight_with_updates(layer, adapters, in_own_pass=False))

    def update_layer(self, *args: Any, config: Any, **kwargs: Any) -> None:
        """As in PEFT, for both weights.

        Raises:
            ValueError: for an adapter of another method, which the two weights would get from PEFT otherwise.
        """
        if not isinstance(config, ResLoRAConfig):
            raise ValueError(
                f"Attention {self.layer_name!r} has an adapter of ResLoRA, and one of {type(config).__name__} cannot "
                "be added there: PEFT's LoRA (0.21.2) would write into the weights in each forward pass. Use "
                "ResLoRAConfig, or two copies of the model."
            )
        super().update_layer(*args, config=config, **kwargs)

    def check_mergeable(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Of both weights.

        Raises:
            ValueError, TypeError: as for other layers; also if the weights are offloaded, which accelerate does not
                load for a module without a forward, as out_proj is.
        """
        weights = self.get_base_layer().in_proj_weight, self.out_projection.get_base_layer().weight
        if adapter_names and not all(map(is_readable, weights)):
            raise ValueError(
                f"No adapter can be merged into attention {self.layer_name!r}, whose weights are {NOT_HERE}. Load the "
                "model onto one device, or into memory, and merge there."
            )
        super().check_mergeable(adapter_names, safe_merge)
        self.out_projection.check_mergeable(adapter_names, safe_merge)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Into both weights."""
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.out_projection.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _merge_into_base(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        base_layer: Any = self.get_base_layer()
        weight = base_layer.in_proj_weight
        for name in check_adapters_to_merge(self, adapter_names):
            if (place := self.chain_of(name)) is not None:
                in_place = id(self) in place[0].in_place
                weight.data = self.add_delta_weight(weight.data, name, in_place)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Of both weights."""
        if self.kept_base or not self.merged:
            super().unmerge()  # says so, where there is nothing to do
        base_layer: Any = self.get_base_layer()
        weight = base_layer.in_proj_weight
        while self.merged_adapters:  # of which no weight was kept
            weight.data = (weight - self.get_delta_weight(self.merged_adapters.pop())).to(weight.dtype)
        self.out_projection.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.MultiheadAttention:
        """The base layer, without the layer in its out_proj."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base_layer: Any = self.get_base_layer()
        base_layer.out_proj = base_layer.out_proj.get_base_layer()
        return base_layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # of linear layers only

    def _restore_weights(self) -> None:
        """PEFT puts new parameters in the place of those that its forward takes out; this one takes out none."""


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
    """Makes the subclasses of quantized layers importable, so that models with them can be pickled."""
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
    become(module, _subclass(kind.__name__))
    if isinstance(module, MultiheadAttention):
        out_proj = module.out_projection
        as_reslora_layer(out_proj, name + OUT_PROJECTION)
        out_proj.__class__ = OutProjection
        out_proj.fan_in_fan_out = False  # whatever the config says of other layers


def become(module: nn.Module, kind: type[ResLoRALayer]) -> None:
    """Turn one of PEFT's LoRA layers into its subclass `kind`, in place."""
    module.__class__ = kind
    module.__dict__.pop("adapter_layer_names", None)  # what PEFT's own variant has added, which is not used
    for parameters in PARAMETER_NAMES:
        if not hasattr(module, parameters):
            setattr(module, parameters, nn.ParameterDict())
    for buffers in BUFFERS:
        setattr(module, buffers, Float32Buffers(UNRECORDED if buffers == "lora_norm" else math.nan))
    module.lora_magnitude_vector = BufferDict(persistent=True)
    module.__dict__.update(arrivals={}, called_adapters=set(), _checked_by_compiler=set())
    module.__dict__["kept_base"] = []  # plain, not a submodule
