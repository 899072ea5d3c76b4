"""The state dict of a native adapter: what PEFT asks of a tuner when an adapter is saved and loaded, for both tuners.

Keys are those of the bare model, whatever wraps its blocks. Each layer's tensors come with a stamp (`stamps.py`).
PEFT's hooks are private; read in 0.21.0 to 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_reslora.shared.digests import ReadFile
from peft_reslora.shared.host import BufferDict, children_by_name, has_adapter, is_being_loaded, own_tensor_names
from peft_reslora.shared.names import PREFIX, bare_name
from peft_reslora.shared.saving import SavedWhole
from peft_reslora.shared.stamps import Arrivals, StampedLayer, can_be_stamped, fault_against, make_stamp
from peft_reslora.shared.undrawn import Undrawn

Parts = dict[str, dict[str, torch.Tensor]]  # a layer's tensors by their names in it, by the layer's bare name
Layer = TypeVar("Layer", bound=StampedLayer)


class NativeCheckpoints(BaseTuner if TYPE_CHECKING else object):  # type: ignore[misc]
    """The state dict hooks of a tuner whose layers are `StampedLayer`s."""

    stamped_layer_cls: type[StampedLayer]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; what it is about to load is not drawn at random first, and the layers of one adapter answer for
        each other's stamps."""
        config: Any = self.peft_config[adapter_name]
        with nullcontext() if config.read_file is None else Undrawn():
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        arrivals = Arrivals()
        for _, layer in adapted_layers(model, self.stamped_layer_cls, adapter_name):
            layer.arrivals[adapter_name] = arrivals

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return bare_name(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """As in PEFT, by the names of the bare model, with a stamp for each layer whose tensors are whole.

        Raises:
            ValueError: if a layer's tensors are not among those that are to be saved.
        """
        layers = {bare_name(name): layer for name, layer in adapted_layers(model, cls.stamped_layer_cls, adapter_name)}
        for layer in layers.values():
            layer.check_loaded(adapter_name)
        state_dict = {bare_name(key): tensor for key, tensor in state_dict.items()}
        selected = super()._get_adapter_state_dict(
            _BareNames(model),
            config,
            adapter_name,
            state_dict,
            unwanted_adapter_names,
        )
        if state_dict:  # other processes than the first have nothing to save under FSDP
            for name, layer in layers.items():
                parts = _select_all(selected, name, layer, adapter_name)
                if all(tensor is None or can_be_stamped(tensor) for tensor in parts.values()):
                    stamp = make_stamp(parts, layer.computation(adapter_name))
                    selected[f"{name}.{layer.stamp_name}.{adapter_name}"] = stamp
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As in PEFT, to the names that the model has; checked before anything is changed.

        Raises:
            ValueError: if tensors are missing, have another shape, would be dropped, are not those that were saved,
                or were saved from another computation. An adapter that PEFT made for them is taken away again.
        """
        try:
            read = config.take_read_file() if isinstance(config, SavedWhole) else None
            remapped = cls._remap_checked(model, adapter_name, state_dict, read)
        except BaseException:
            if is_being_loaded(model, adapter_name):
                model.delete_adapter(adapter_name)  # type: ignore[operator]
            raise
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, remapped)

    @classmethod
    def _remap_checked(
        cls, model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor], read: ReadFile | None
    ) -> dict[str, torch.Tensor]:
        layers = {canonical(name): layer for name, layer in adapted_layers(model, cls.stamped_layer_cls, adapter_name)}
        suffix = f".{cls.stamped_layer_cls.stamp_name}"
        given = {canonical(cls._remove_adapter_name_from_key(k, adapter_name)): v for k, v in state_dict.items()}
        stamps = {key.removesuffix(suffix): given.pop(key) for key in list(given) if key.endswith(suffix)}
        found = {name: _parts_of(name, layer, adapter_name, given) for name, layer in layers.items()}
        restore = cls._make_room(layers, adapter_name, found)
        try:
            held = model.state_dict()
            keys = {canonical(cls._remove_adapter_name_from_key(key, adapter_name)): key for key in held}
            _refuse_misfit(layers, adapter_name, given, {key: held[own] for key, own in keys.items()})
            _refuse_unsaved(layers, adapter_name, found, stamps, None if read is None else read.renamed(canonical))
        except BaseException:
            restore()
            raise
        for layer in layers.values():
            layer.forget_stamp(adapter_name)
        # PEFT takes a prefix off each key after this hook, where it sees none on the parameters, as under FSDP1.
        lost = "" if any(name.startswith(PREFIX) for name, _ in model.named_parameters()) else PREFIX
        return {(lost if keys[k].startswith(PREFIX) else "") + keys[k]: tensor for k, tensor in given.items()}

    @classmethod
    def _make_room(cls, layers: Mapping[str, StampedLayer], adapter_name: str, found: Parts) -> Callable[[], None]:
        """Give the layers the buffers that a checkpoint brings; returns what undoes it."""
        return lambda: None


class _BareNames:
    """A model as PEFT's selection of an adapter's tensors sees it: modules by their names in the bare model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As of the model, by bare names."""
        for name, module in self._model.named_modules():
            yield bare_name(name), module


def canonical(key: str) -> str:
    """A key of a state dict or a module's name, without what wrappers and PeftModel put before and into it."""
    return bare_name(key).removeprefix(PREFIX)


def adapted_layers(model: nn.Module, kind: type[Layer], adapter_name: str) -> Iterator[tuple[str, Layer]]:
    """The layers of a tuner that have the adapter, with their names in the model."""
    for name, layer in model.named_modules():
        if isinstance(layer, kind) and has_adapter(layer, adapter_name):
            yield name, layer


def _parts_of(name: str, layer: StampedLayer, adapter_name: str, given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A layer's tensors in a checkpoint, by the names of `stamped_parts`."""
    parts = {part: _keys_of(name, part) for part in layer.stamped_parts(adapter_name)}
    return {part: next((given[key] for key in keys if key in given), None) for part, keys in parts.items()}


def _keys_of(name: str, part: str) -> tuple[str, str]:
    """Those that a part of a layer may have in a checkpoint: a tensor, or the weight of a module."""
    return f"{name}.{part}", f"{name}.{part}.weight"


def _select_all(
    selected: dict[str, torch.Tensor], name: str, layer: StampedLayer, adapter_name: str
) -> dict[str, torch.Tensor | None]:
    """A layer's tensors among those that are to be saved, by the names of `stamped_parts`.

    A state dict made of parameters alone, as some training scripts collect it, is completed by the layer's buffers.

    Raises:
        ValueError: if a parameter is not among them.
    """
    parts: dict[str, torch.Tensor | None] = {}
    for part, own in layer.stamped_parts(adapter_name).items():
        keys = (f"{name}.{part}.{adapter_name}", f"{name}.{part}.{adapter_name}.weight")
        if own is not None and not isinstance(own, nn.Parameter):
            selected.setdefault(keys[0], own)
        parts[part] = next((selected[key] for key in keys if key in selected), None)
        if own is not None and parts[part] is None:
            raise ValueError(
                f"{part} of adapter {adapter_name!r} on layer {name!r} is not in the state dict that is to be saved. "
                "Pass save_pretrained the whole state dict of this model, or none."
            )
    return parts


def _refuse_misfit(
    layers: Mapping[str, StampedLayer],
    adapter_name: str,
    given: Mapping[str, torch.Tensor],
    held: Mapping[str, torch.Tensor],
) -> None:
    """A checkpoint has to have all of the adapter's tensors, and nothing that PEFT would drop without a word.

    `given` is the checkpoint and `held` the model's state dict, both by canonical keys.

    Raises:
        ValueError: listing missing, extra and misshapen tensors.
    """
    ranks = {
        key: f", that of r={layer.r[adapter_name]}"
        for name, layer in layers.items()
        for part in layer.stamped_parts(adapter_name)
        for key in _keys_of(name, part)
        if key in held
    }
    faults = {
        "missing": sorted(ranks.keys() - given.keys()),
        "not in the model": sorted(given.keys() - held.keys()),
        "of another shape": [
            f"{key} has shape {tuple(tensor.shape)} instead of {tuple(held[key].shape)}{ranks.get(key, '')}"
            for key, tensor in given.items()
            if key in held and tensor.shape != held[key].shape and held[key].is_floating_point()
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in faults.items() if keys)
        raise ValueError(
            f"The checkpoint does not fit adapter {adapter_name!r} on this model: {listed}. Load it onto the base "
            "model it was trained on, with the config it was saved with."
        )


def _refuse_unsaved(
    layers: Mapping[str, StampedLayer],
    adapter_name: str,
    found: Parts,
    stamps: Mapping[str, torch.Tensor],
    read: ReadFile | None,
) -> None:
    """What is loaded has to be what was saved, for the computation that the model will do with it.

    `read` is the adapter's file, by canonical keys, if its tensors have been hashed in this load.

    Raises:
        ValueError: naming layer, what is wrong and what to do.
    """
    for name, layer in layers.items():
        if (stamp := stamps.get(name)) is None:
            continue
        parts: Mapping[str, torch.Tensor | None] = found[name]
        known = {} if read is None else _known_digests(name, parts, read)
        accepted = layer.accepted_computations(adapter_name)
        faults = [fault_against(stamp, parts, computation, known) for computation in accepted]
        if None not in faults:
            fault = next(fault for fault in faults if fault is not None)
            entry = f"{name}.{layer.stamp_name}"
            raise ValueError(
                f"What is to be loaded as adapter {adapter_name!r} into layer {name!r} cannot be used: {fault}. Load "
                "it with the config it was saved with, under a name that no other adapter has, from a whole copy. If "
                f"the tensors were changed on purpose, leave out the entries such as {entry!r} that vouch for them."
            )


def _known_digests(name: str, parts: Mapping[str, torch.Tensor | None], read: ReadFile) -> dict[str, bytes | None]:
    """By part of a layer, the digest of what is loaded, if that is what was hashed."""
    known = {}
    for part, tensor in parts.items():
        if tensor is not None:
            digests = [read.digest_of(key, tensor) for key in _keys_of(name, part)]
            known[part] = digests[0] or digests[1]
    return known


def refuse_adapter_name(model: nn.Module, adapter_name: str, tuner: type[NativeCheckpoints]) -> None:
    """Refuse a name by which PEFT could not tell the adapter's tensors from others.

    PEFT takes the name out of the keys when it saves, and drops keys that hold the name of another adapter; both by
    the parts between the dots. So the name must be no part of a key of the model.

    Raises:
        ValueError: saying why.
    """
    containers = (nn.ModuleDict(), nn.ParameterDict(), BufferDict())
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        fault = "a name is a string that is not empty and without dots"
    elif any(hasattr(container, adapter_name) for container in containers):
        fault = "torch's containers have an attribute of that name"
    elif adapter_name in (taken := _key_parts(model)):
        fault = f"it is a part of the name of {taken[adapter_name]!r} in the model, which saving could not tell apart"
    elif adapter_name in _own_parts(tuner):
        fault = "layers with adapters have a part of that name"
    else:
        return
    raise ValueError(f"The adapter cannot be called {adapter_name!r}: {fault}. Choose another, such as 'default'.")


def _own_parts(tuner: type[NativeCheckpoints]) -> Collection[str]:
    layer = tuner.stamped_layer_cls
    names = {*layer.part_names, layer.stamp_name, f"{tuner.prefix}dropout"}
    return names | {"base_layer", "base_model", "bias", "model", "modules_to_save", "original_module", "weight"}


def _key_parts(model: nn.Module) -> dict[str, str]:
    """The parts of the names in the bare model, each with a name that it is from."""
    wrappers: Any = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    inside: tuple[str, ...] = ()  # of adapters and copies of modules: their names are no part of the bare model's
    parts: dict[str, str] = {}
    for name, module in model.named_modules():
        if inside and f"{name}.".startswith(inside):
            continue
        if isinstance(module, wrappers):
            own = ("base_layer", "original_module")
            inside += tuple(f"{name}.{child}." for child in children_by_name(module) if child not in own)
        names = [name, *(f"{name}.{key}" for key in own_tensor_names(module))]
        for full in names:
            parts |= {part: full for part in full.split(".") if part and part not in parts}
    return parts
