"""The layer: the square matrices of its adapters beside a frozen base layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.shared.base_weights import (
    give_back_weight,
    give_up,
    own_weight,
    refuse_given_up,
    refuse_overflow,
    refuse_unreadable,
    refuse_unwritable,
)
from peft_reslora.shared.host import BufferDict, apply_to_tensors, cast_input, convolve, in_out_features, own_parameter
from peft_reslora.shared.offloading import held_tensor, onloaded
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.quantized import keep_bias, kept_copy, put_back, refuse_repacked
from peft_reslora.shared.stamps import StampedLayer
from peft_reslora.shared.tensors import NOT_HERE, is_readable

from .config import MoRAConfig, computation
from .operators import OPERATORS, MoRAType, add_delta_weight, delta_weight, sharing_factors, square_size


class SquareMatrices(nn.ParameterDict):
    """M `(q, q)` by adapter. Offloading and sharding load the parameters of a module for its call, so that it is
    called where M is used; a view stays when the parameter is unloaded after the call."""

    __call__ = nn.Module.__call__  # nn.ParameterDict's refuses

    def forward(self, adapter_name: str) -> torch.Tensor:
        M = self[adapter_name]
        return M.view_as(M)


class MoRALayer(StampedLayer, BaseTunerLayer):
    """The adapters of one base layer: a square matrix each, and how it meets the input.

    `layer_name` is for messages only: the name of the layer in the model when it was first adapted.
    """

    adapter_layer_names: tuple[str, ...] = ("mora_M",)
    other_param_names: tuple[str, ...] = ("r", "mora_type", "square_size", "scaling", "mora_dropout", "mora_stamp")
    stamp_name = "mora_stamp"
    part_names = ("mora_M",)
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, layer_name: str = "without a name", **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.layer_name = layer_name
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.mora_M = SquareMatrices()
        self.mora_dropout = nn.ModuleDict()
        self.mora_stamp = BufferDict(persistent=True)
        self.arrivals = {}
        self.called_adapters = set()
        self._checked_by_compiler = set()
        self.r: dict[str, int] = {}
        self.mora_type: dict[str, MoRAType] = {}
        self.square_size: dict[str, int] = {}
        self.restarting: set[str] = set()  # adapters whose checkpoints may be of another operator
        self.scaling: dict[str, float] = {}  # by adapter: what its update is multiplied by, in all that is made of it
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self.in_features, self.out_features = in_out_features(self.get_base_layer())  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, int]:
        """How many features the operator reads, and how many it gives: the columns and rows of the delta weight."""
        return self.in_features, self.out_features

    def update_layer(self, adapter_name: str, r: int, config: MoRAConfig) -> None:
        """Add an adapter whose matrix has about as many entries as LoRA of rank `r`."""
        mora_type = config.resolve_type(r)
        q = square_size(*self.shape, r, mora_type)
        self.r[adapter_name], self.mora_type[adapter_name], self.square_size[adapter_name] = r, mora_type, q
        self.scaling[adapter_name] = 1.0
        self.mora_dropout[adapter_name] = nn.Dropout(config.mora_dropout) if config.mora_dropout else nn.Identity()
        self.mora_M[adapter_name] = nn.Parameter(torch.zeros(q, q))
        if not config.init_weights:
            nn.init.uniform_(self.mora_M[adapter_name], -(q**-0.5), q**-0.5)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if config.stamped:
            self.await_stamp(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the update of `adapter` by `scale` from now on, instead of by 1.

        As in LoRA, an adapter that is not on this layer is passed over, and a saved adapter does not keep its scale.

        Raises:
            ValueError: if the adapter is merged.
        """
        if adapter not in self.scaling:
            return
        if adapter in self.merged_adapters and scale != self.scaling[adapter]:
            raise ValueError(
                f"Adapter {adapter!r} is merged into layer {self.layer_name} with scale {self.scaling[adapter]}, "
                "which cannot be changed there. Unmerge it, set the scale, and merge again."
            )
        self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters by `scale`.

        Raises:
            ValueError: if one of them is merged.
        """
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.set_scale(adapter_name, self.scaling[adapter_name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of all active adapters by `scale`, or set it to 1.

        Raises:
            ValueError: if one of them is merged, or `scale` is 0.
        """
        if scale == 0:
            raise ValueError("A scale cannot be divided by 0; unscale_layer(None) sets it to 1.")
        for adapter_name in self.active_adapters:
            if adapter_name in self.scaling:
                self.set_scale(adapter_name, 1.0 if scale is None else self.scaling[adapter_name] / scale)

    def stamped_parts(self, adapter_name: str) -> dict[str, torch.Tensor | None]:
        return {"mora_M": self.mora_M[adapter_name]}

    def computation(self, adapter_name: str) -> str:
        return computation(self.mora_type[adapter_name])

    def accepted_computations(self, adapter_name: str) -> list[str]:
        if adapter_name not in self.restarting:
            return super().accepted_computations(adapter_name)
        return [computation(operator) for operator in OPERATORS]

    def layer_title(self, adapter_name: str) -> str:
        return self.layer_name

    @full_precision()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What merging adds to the base weight, in the base weight's own orientation, at least in float32."""
        return self.as_weight(
            delta_weight(self._exact_matrix(adapter_name), *self.shape, self.mora_type[adapter_name])
        )

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix `(out_features, in_features)` in the shape of the base layer's weight."""
        return matrix.T if self.fan_in_fan_out else matrix

    @full_precision()
    def merged_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """LoRA factors A `(q, in_features)` and B `(out_features, q)` with B @ A equal to the update, in `nn.Linear`'s
        orientation and at least in float32.

        Raises:
            ValueError: if the adapter is not of type sharing, as no small factors are exact then.
        """
        M = self._exact_matrix(adapter_name)
        if (mora_type := self.mora_type[adapter_name]) != "sharing":
            raise ValueError(
                f"Adapter {adapter_name!r} has mora_type={mora_type!r} on layer {self.layer_name}: its update is full "
                "rank, so that no LoRA of a small rank equals it; only mora_type='sharing' has exact factors. Pass "
                "`rank=` or `energy=` for the nearest LoRA, or call `merge_and_unload` for an exact model without "
                "adapters."
            )
        return sharing_factors(M, *self.shape)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_base_weight(self) -> torch.Tensor:
        """The base weight as plain numbers, dequantized if need be.

        Raises:
            TypeError: if PEFT cannot dequantize it.
            ValueError: if bitsandbytes has repacked it.
        """
        base_layer = self.get_base_layer()
        refuse_repacked(base_layer, self.layer_name)
        if self.quantization_backend is None and own_parameter(base_layer, "weight") is not None:
            weight = held_tensor(base_layer, "weight").detach()
        else:
            weight = super().get_base_weight()
        refuse_unreadable(weight, self.layer_name)
        return weight

    def _exact_matrix(self, adapter_name: str) -> torch.Tensor:
        """M times its scale, at least in float32."""
        if adapter_name not in self.mora_M:
            raise ValueError(
                f"Adapter {adapter_name!r} is not on layer {self.layer_name}; "
                f"it has {', '.join(map(repr, self.mora_M)) or 'none'}."
            )
        self.check_loaded(adapter_name)
        M = held_tensor(self.mora_M, adapter_name)
        if not is_readable(M):
            raise RuntimeError(
                f"The matrix of adapter {adapter_name!r} on layer {self.layer_name} is {NOT_HERE}. Save the "
                "adapter and load it into a model without sharding and offloading."
            )
        exact = M.to(torch.promote_types(M.dtype, torch.float32))
        return exact if self.scaling[adapter_name] == 1 else exact * self.scaling[adapter_name]


class MoRALinear(nn.Module, MoRALayer):
    """MoRA on a linear layer: `nn.Linear`, transformers' `Conv1D`, or a quantized one that PEFT knows."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: MoRAConfig, **kwargs: Any) -> None:
        super().__init__()
        MoRALayer.__init__(self, base_layer, **kwargs)
        # While merged: the base weight from before, or where it is quantized a copy of the base layer. In a list, so
        # that it is no part of the state dict.
        self._unmerged: list[nn.Parameter | nn.Module] = []
        # By whoever merges all layers and needs no weight from before: this one may be written into, and was checked.
        self.merges_in_place, self.merges_checked = False, False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) + sum over the active adapters of decompress(scaling M compress(dropout(x))).

        x may come as `input`, the name that torch's layers have for it, by which diffusers' motion modules give it
        (0.42).
        """
        if x is None and "input" in kwargs:
            x = kwargs.pop("input")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter_name in self.active_adapters:
            if adapter_name in self.mora_M:
                self._refuse_offloaded_training(self.mora_M[adapter_name], x)
                self.note_call(adapter_name)
                M = self.mora_M(adapter_name)
                if (scale := self.scaling[adapter_name]) != 1:
                    M = M * scale
                dropped = self.mora_dropout[adapter_name](cast_input(self, x, M.dtype))
                result = result + self.update(dropped, M, self.mora_type[adapter_name])
        return result.to(dtype)

    def update(self, x: torch.Tensor, M: torch.Tensor, mora_type: MoRAType) -> torch.Tensor:
        """decompress(M compress(x))."""
        return OPERATORS[mora_type](x, M, self.out_features)

    def _refuse_offloaded_training(self, M: torch.Tensor, x: torch.Tensor) -> None:
        if M.is_meta and M.requires_grad and torch.is_grad_enabled() and not x.is_meta:
            raise RuntimeError(
                f"The matrix of layer {self.layer_name} is offloaded while gradients are enabled; accelerate loads a "
                "copy of it, whose gradient is lost. Keep the blocks that are trained on a device (device_map), or "
                "run inference under torch.no_grad()."
            )

    @full_precision()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base weight by its sum with the delta weights of the adapters, summed in float32 or better.

        A result that is not finite is refused, and the layer left as it was.

        Args:
            safe_merge: refuse that in PEFT's words.
            adapter_names: the adapters to merge, all active ones by default; those merged already are left out.

        Raises:
            ValueError: as `check_mergeable`.
            TypeError: as `check_mergeable`.
        """
        names = self.adapters_to_merge(check_adapters_to_merge(self, adapter_names))
        if not self.merges_checked:
            self.check_mergeable(names, safe_merge)
        if not names:
            return
        try:
            kept = self._merge_into_base(names)
        except BaseException:
            if self.merges_in_place:
                give_up(self, self.layer_name)
            raise
        if not self.merged:
            self._unmerged = [] if self.merges_in_place else [kept]
        self.merged_adapters.extend(names)

    def _merge_into_base(self, names: Sequence[str]) -> nn.Parameter | nn.Module:
        """Returns what puts the base weight back; nothing does where it merges in place."""
        base_layer = self.get_base_layer()
        with onloaded(base_layer):
            weight = self.get_base_weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            # In place where the weight from before is given up, and already is as wide as the sum.
            merged = weight.to(wide, copy=not self.merges_in_place)
            for name in names:
                self._add_delta_weight(merged, name)
            kept = kept_copy(base_layer) if self.quantization_backend is not None else own_weight(base_layer)
            self.set_base_weight(merged.to(weight.dtype))
            keep_bias(self.get_base_layer(), base_layer)
        return kept

    def _add_delta_weight(self, weight: torch.Tensor, adapter_name: str) -> None:
        """Add the adapter's delta weight to a weight of the base layer's orientation, in place."""
        M = self._exact_matrix(adapter_name).to(weight.device)
        add_delta_weight(weight.T if self.fan_in_fan_out else weight, M, self.mora_type[adapter_name])

    def adapters_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        """Those of the adapters, the active ones by default, that the layer has and that are not merged into it."""
        names = self.active_adapters if adapter_names is None else adapter_names
        return [name for name in dict.fromkeys(names) if name in self.mora_M and name not in self.merged_adapters]

    @full_precision()
    def check_mergeable(self, adapter_names: Sequence[str], safe_merge: bool = False) -> None:
        """Refuse a merge that would be lost, or that would leave NaN or inf, while nothing has been changed.

        Raises:
            ValueError: naming the layer, and the adapter whose update does not fit.
            TypeError: if the base weight cannot be read as plain numbers.
        """
        if not adapter_names:
            return
        refuse_given_up(self, self.layer_name)
        if self.quantization_backend is None:
            refuse_unwritable(self.get_base_layer(), self.layer_name)
        # An entry of a delta weight is one of M, or by rotation made of two; where columns wrap round, some add up.
        bounds = {
            name: 2 * (1 + math.ceil(M.shape[1] / self.shape[0])) * float(M.abs().max())
            for name, M in ((name, self._exact_matrix(name)) for name in adapter_names)
        }
        deltas = {name: partial(self.get_delta_weight, name) for name in adapter_names}
        # Of a quantized weight, take the narrowest of the dtypes into which it can be dequantized.
        dtype = torch.float16 if self.quantization_backend is not None else self.get_base_weight().dtype
        refuse_overflow(self.get_base_weight, dtype, deltas, bounds, self.layer_name, safe_merge)

    @full_precision()
    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if not self._unmerged:
            raise RuntimeError(
                f"The weight of layer {self.layer_name} from before the merge was given up by merge_and_unload, which "
                "did not come to its end. Load the base model and the adapter again."
            )
        unmerged = self._unmerged.pop()
        with onloaded(self.get_base_layer()):
            if isinstance(unmerged, nn.Module):
                put_back(self.get_base_layer(), unmerged)
            else:
                give_back_weight(self.get_base_layer(), unmerged)
        self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            warnings.warn(
                f"Adapter {adapter_name!r} is merged into layer {self.layer_name}, which is unmerged to delete it.",
                stacklevel=2,
            )
            self.unmerge()
        super().delete_adapter(adapter_name)
        self.called_adapters.discard(adapter_name)
        self.arrivals.pop(adapter_name, None)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MoRALinear:
        super()._apply(fn, recurse)
        for kept in self._unmerged:
            if isinstance(kept, nn.Module):  # a plain weight may be another module's too, and follows when put back
                apply_to_tensors(kept, fn)
        return self

    def __repr__(self) -> str:
        return "mora." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


class MoRAConvolution(MoRALinear):
    """MoRA on `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` in one group: the operator of a linear layer, on patches.

    A kernel `(out, in, *size)` is the matrix `(out, in * positions)` of what it makes of a patch. The paper has linear
    layers only. Here the update of a convolution is the kernel whose matrix is the operator's.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """How many entries a patch has, and how many channels come out."""
        return self.in_features * math.prod(self._convolution.kernel_size), self.out_features

    @property
    def _convolution(self) -> Any:
        return self.get_base_layer()

    def as_weight(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.unflatten(1, (self.in_features, *self._convolution.kernel_size))

    def _add_delta_weight(self, weight: torch.Tensor, adapter_name: str) -> None:
        weight += self.get_delta_weight(adapter_name).to(weight.device)  # which may lie in memory in another order

    def update(self, x: torch.Tensor, M: torch.Tensor, mora_type: MoRAType) -> torch.Tensor:
        """The operator on each patch of x, as one convolution, with the base's stride, padding and dilation."""
        return convolve(self._convolution, x, self.as_weight(delta_weight(M, *self.shape, mora_type)))
