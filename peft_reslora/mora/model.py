"""The tuner: puts MoRA layers into a model, checks checkpoints, reports sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from torch.distributed.tensor import DTensor

from peft_reslora.shared.base_weights import (
    merged_or_not,
    own_memory,
    refuse_inseparable,
    refuse_shared_modules,
    refuse_unknown,
    untie,
)
from peft_reslora.shared.checkpoints import NativeCheckpoints, refuse_adapter_name
from peft_reslora.shared.fields import oversized, refuse_slow_patterns
from peft_reslora.shared.first_pass import after_pass, stop_watching, watch_first_pass
from peft_reslora.shared.host import CONVOLUTIONS, in_out_features, own_parameter
from peft_reslora.shared.patterns import by_pattern
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.targets import find_targets, is_plain_linear, refuse_merged
from peft_reslora.shared.undo import configs_kept, undone_on_failure

from .config import MoRAConfig
from .layer import MoRAConvolution, MoRALayer, MoRALinear
from .operators import MoRAType


class MoRAModel(NativeCheckpoints, BaseTuner):
    """A model with MoRA layers (arXiv 2405.12130) in place of its target layers.

    Args:
        model: the model to adapt; its own parameters are frozen.
        peft_config: the [`MoRAConfig`].
        adapter_name: the name of the adapter.
        low_cpu_mem_usage: create the matrices on the meta device, for a checkpoint to fill them.

    Example:
        ```py
        >>> import peft_reslora
        >>> from peft import get_peft_model
        >>> from peft_reslora import MoRAConfig

        >>> model = get_peft_model(model, MoRAConfig(r=8, target_modules=["q_proj", "v_proj"]))
        ```
    """

    peft_config: dict[str, MoRAConfig]  # type: ignore[assignment]
    prefix: str = "mora_"
    tuner_layer_cls = MoRALayer
    stamped_layer_cls = MoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with configs_kept(model):
            super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._warn_of_an_uncopied_reference(model, adapter_name)
        config = self.peft_config[adapter_name]
        with undone_on_failure(self, model, adapter_name):
            refuse_adapter_name(model, adapter_name, type(self))
            refuse_slow_patterns(config, [name for name, _ in model.named_modules()])
            why_not = partial(_why_not, quantization=get_quantization_kwargs(model))
            targets = find_targets(model, config, self.target_module_mapping, why_not, kwargs.get("state_dict"))
            for name, layer in targets.layers.items():
                self._refuse_oversized(config, name, layer)
            refuse_merged(model, adapter_name)
            targets.narrow(config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            watch_first_pass(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # past the hooks of the model (PEFT 0.21.2)
        after_pass(self.model)
        return output

    def _warn_of_an_uncopied_reference(self, model: nn.Module, adapter_name: str) -> None:
        """TRL's trainers (read in 1.16) add a reference with the config of the trained adapter, and copy into it the
        parameters whose names hold '.default.'; those of MoRA, as of most of PEFT's tuners but LoRA, end in it."""
        config = self.peft_config[adapter_name]
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        matrices = [M for layer in model.modules() if isinstance(layer, MoRALayer) for M in layer.mora_M.items()]
        if any(name in twins and not M.is_meta and M.any() for name, M in matrices):
            warnings.warn(
                f"Adapter {adapter_name!r} has the config of {twins[0]!r}, which has been trained, but it starts at "
                "zero. If it is to be a copy, as TRL's DPOTrainer and others mean it when they start from a trained "
                "adapter, copy it yourself: set_peft_model_state_dict(trainer.model, get_peft_model_state_dict("
                f"trainer.model, adapter_name={twins[0]!r}), adapter_name={adapter_name!r}).",
                stacklevel=2,
            )

    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def _refuse_oversized(self, peft_config: Any, name: str, module: nn.Module) -> None:
        base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        in_features, out_features = in_out_features(base_layer)
        if in_features and isinstance(base_layer, CONVOLUTIONS):
            in_features *= math.prod(base_layer.kernel_size)
        r = by_pattern(peft_config.rank_pattern, name, peft_config.r)
        if in_features and out_features and (fault := oversized(r, in_features, out_features)):
            raise ValueError(f"MoRA cannot adapt layer {name!r}: {fault}. Lower r or its entry in rank_pattern.")

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: MoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = by_pattern(peft_config.rank_pattern, current_key, peft_config.r)
        if isinstance(target, MoRALayer):
            target.update_layer(adapter_name, r, peft_config)
            return
        quantization = get_quantization_kwargs(self)
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = MoRAConvolution if isinstance(base_layer, CONVOLUTIONS) else MoRALinear
        new_module = kind(target, adapter_name, r, peft_config, layer_name=current_key, **quantization)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter does not train until it is set
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, MoRALayer):  # unloaded: its base layer is as it has to be, and HQQ's have no `weight`
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @full_precision()
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, but what cannot be merged is refused before the first layer is changed."""
        self._check_mergeable(adapter_names, safe_merge)
        with merged_or_not(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @full_precision()
    def unmerge_adapter(self) -> None:
        super().unmerge_adapter()

    @full_precision()
    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """As in PEFT, but what cannot be merged is refused before the first layer is changed."""
        layers = self._check_mergeable(adapter_names, safe_merge)
        weights = [f"{name}.weight" for name in layers]
        refuse_inseparable(self.model, weights)
        with _merged_for_good(self.model, layers.values(), in_place=not safe_merge):
            merged = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        untie(merged, weights)
        return merged

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        unloaded: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_watching(unloaded)
        return unloaded

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> dict[str, MoRALinear]:
        """The layers into which the adapters are merged or are to be, if they can be."""
        names = self.active_adapters if adapter_names is None else adapter_names
        refuse_unknown(names, self.peft_config)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, MoRALinear) and (module.merged or module.adapters_to_merge(names))
        }
        refuse_shared_modules(self.model, layers)
        for layer in layers.values():
            layer.check_mergeable(layer.adapters_to_merge(names), safe_merge)
        return layers

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # PEFT would warn of them before a merge; here they get weights of their own (0.21.2)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "MoRA does not support `adapter_names` in a forward pass: all samples of a batch use the active "
                "adapters. Split the batch and call `set_adapter` for each part."
            )
        yield


@dataclass(frozen=True)
class LayerSize:
    """What MoRA made of one layer, for reports."""

    name: str
    in_features: int
    out_features: int
    r: int
    mora_type: MoRAType
    square_size: int

    @property
    def parameters(self) -> int:
        """Entries of M."""
        return self.square_size**2

    @property
    def lora_parameters(self) -> int:
        """What LoRA of the same rank would train here."""
        return self.r * (self.in_features + self.out_features)


def layer_sizes(model: nn.Module, adapter_name: str = "default") -> list[LayerSize]:
    """The size of each MoRA layer of `adapter_name`, in the order of the model."""
    return [
        LayerSize(
            name,
            *layer.shape,
            layer.r[adapter_name],
            layer.mora_type[adapter_name],
            layer.square_size[adapter_name],
        )
        for name, layer in model.named_modules()
        if isinstance(layer, MoRALayer) and adapter_name in layer.mora_M
    ]


@contextmanager
def _merged_for_good(model: nn.Module, layers: Collection[MoRALinear], in_place: bool) -> Iterator[None]:
    """Let the layers, which have been checked, merge into the memory of their weights where nothing else of the model
    reads it; not in a safe merge, which in PEFT too leaves that memory as it is for others."""
    own = own_memory(model) if in_place else set()
    for layer in layers:
        layer.merges_checked = True
        weight = own_parameter(layer.get_base_layer(), "weight")
        layer.merges_in_place = id(weight) in own and not (layer.merged or weight.is_inference())  # type: ignore[union-attr]
    try:
        yield
    finally:
        for layer in layers:
            layer.merges_checked = layer.merges_in_place = False


def _is_split(module: nn.Module) -> bool:
    """Whether a process computes with a part of the layer only, which PEFT then takes for the whole (0.21.2)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, DTensor) and in_out_features(module) != (weight.shape[1], weight.shape[0])


def _why_not(module: nn.Module, quantization: dict[str, Any]) -> str | None:
    """Why MoRA cannot adapt a layer of this kind, or None."""
    if isinstance(module, MoRALayer):
        return None
    if isinstance(module, BaseTunerLayer):
        return "which already carries an adapter of another method: merge or unload that first"
    if getattr(module, "_hf_tp_plan", None) is not None or _is_split(module):
        return "whose weight is split over processes (tensor parallel), of which each would adapt its own part"
    backend = resolve_quantization_backend(module, **quantization)
    if is_plain_linear(module) or (backend is not None and backend.layer_type == "linear"):
        return None
    if not isinstance(module, CONVOLUTIONS):
        return "which is no linear layer"
    if type(module) not in CONVOLUTIONS:
        return "which is no linear layer and computes another convolution than torch's own class"
    if module.groups > 1:
        return (
            f"which is a convolution in {module.groups} groups, whose channels the square matrix would mix; "
            "ResLoRAConfig(shortcut='block') adapts it"
        )
    return None
