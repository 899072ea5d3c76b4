"""The weight that a merge changes: whose it is, whether it can be written at all, and whether the sum fits into it.

A merge gives the layer a parameter of its own and does not write into the one that was there, unless that is given up
and nothing else reads its memory. So whatever shares it (a tied embedding, a replicated layer, a second name of the
same parameter) keeps it, and unmerging puts back the very object: bit for bit, and tied as before.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from torch import nn
from torch.nn.utils import parametrize
from transformers import PretrainedConfig, PreTrainedModel

from peft_reslora.shared.host import children_by_name, own_parameter, own_tensor_names
from peft_reslora.shared.offloading import offload_hook

_READABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def own_weight(base_layer: nn.Module, name: str = "weight") -> nn.Parameter:
    """Give a layer a parameter `name` of its own, with the values of the one that it had, which is returned.

    The new one still reads the same memory: a merge has to put another tensor into it, or know of `own_memory`.
    """
    held: Any = getattr(base_layer, name)
    own = nn.Parameter(held.data, requires_grad=held.requires_grad)
    vars(own).update(vars(held))
    setattr(base_layer, name, own)
    # What was loaded for the merge only is not to stay on the device for its sake.
    return held if offload_hook(base_layer) is None else nn.Parameter(held.data.cpu(), held.requires_grad)


def own_memory(model: nn.Module) -> set[int]:
    """The ids of the parameters that share their memory with no other and no buffer, under whatever name."""
    places = [(id(p), _place(p)) for _, p in model.named_parameters(remove_duplicate=False) if not p.is_meta]
    buffers = (_place(buffer) for _, buffer in model.named_buffers(remove_duplicate=False) if not buffer.is_meta)
    uses = Counter([*(place for _, place in places), *buffers])
    return {parameter for parameter, place in places if place and uses[place] == 1}


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor) in (nn.Parameter, torch.Tensor) else 0


def give_up(layer: nn.Module, layer_name: str) -> None:
    """Refuse all further use of a layer in whose weight an update is left half written, by a merge that failed."""
    layer.forward = partial(_refuse_given_up, layer_name)


def refuse_given_up(layer: nn.Module, layer_name: str) -> None:
    """Refuse to merge into a layer that `give_up` has seen.

    Raises:
        RuntimeError: naming it.
    """
    forward = vars(layer).get("forward")
    if isinstance(forward, partial) and forward.func is _refuse_given_up:
        _refuse_given_up(layer_name)


def _refuse_given_up(layer_name: str, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        f"A merge_and_unload that failed has left the weight of layer {layer_name!r} half written, and keeps none "
        "from before. Load the base model and the adapter again; merge_adapter() and safe_merge=True can be undone."
    )


def give_back_weight(base_layer: nn.Module, held: nn.Parameter, name: str = "weight") -> None:
    """Undo `own_weight`; a layer that was moved or cast meanwhile stays so."""
    now: Any = getattr(base_layer, name)
    if (held.device, held.dtype) != (now.device, now.dtype):
        held.data = held.data.to(now.device, now.dtype)
    setattr(base_layer, name, held)


def refuse_unwritable(base_layer: nn.Module, layer_name: str, name: str = "weight") -> None:
    """Refuse a plain layer whose weight, held as `name`, is no parameter, or no plain numbers.

    Raises:
        ValueError: if the weight is computed from other parameters at every use, so that a merge would be lost.
        TypeError: as `refuse_unreadable`.
    """
    weight = own_parameter(base_layer, name)
    if weight is None:
        raise ValueError(
            f"No adapter can be merged into layer {layer_name!r}, whose weight is computed anew from other tensors "
            f"({_sources(base_layer, name)}) at every use, so that the merge would be lost. Make it a parameter "
            f"before, by torch.nn.utils.parametrize.remove_parametrizations(layer.base_layer, {name!r}) or, for the "
            "older hooks, remove_weight_norm and the like; or export the adapter with export_lora."
        )
    refuse_unreadable(weight, layer_name)


def refuse_unreadable(weight: torch.Tensor, layer_name: str) -> None:
    """Refuse a weight that is no plain numbers.

    Raises:
        TypeError: naming the layer and the type.
    """
    if weight.dtype not in _READABLE_DTYPES:
        raise TypeError(
            f"The weight of layer {layer_name} has type {weight.dtype}, which PEFT cannot dequantize. Load the base "
            "model in float32, bfloat16 or float16 to merge."
        )


def _sources(base_layer: nn.Module, name: str) -> str:
    if parametrize.is_parametrized(base_layer, name):
        return ", ".join(type(step).__name__.lstrip("_") for step in base_layer.parametrizations[name])  # type: ignore[index]
    return ", ".join(name for name in own_tensor_names(base_layer) if name != "bias") or "none of its own"


def computed_weight(base_layer: Any) -> torch.Tensor:
    """The weight `(out_features, in_features)` that a layer computes for its calls, as its calls show it."""
    like = next(base_layer.parameters())
    eye = torch.eye(base_layer.in_features, device=like.device, dtype=like.dtype)
    return (base_layer(eye) - base_layer(torch.zeros_like(eye[:1]))).t()


def broken_adapter_message(adapter_name: str) -> str:
    """PEFT's own words, which its users and tests look for."""
    return f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"


def refuse_overflow(
    weight: Callable[[], torch.Tensor],
    dtype: torch.dtype,
    deltas: Mapping[str, Callable[[], torch.Tensor]],
    bounds: Mapping[str, float],
    layer_name: str,
    safe_merge: bool = False,
) -> None:
    """Refuse to merge what makes a weight infinite or NaN, while nothing has been changed.

    Args:
        weight: gives the weight before the merge; asked for only if the bounds do not settle it.
        dtype: of the merged weight.
        deltas: what is added, by adapter; asked for as `weight` is.
        bounds: by adapter, a number that no entry of its delta exceeds; not finite if the adapter is not.
        layer_name: for the message.
        safe_merge: begin it with PEFT's words, which its users look for.

    Raises:
        ValueError: naming adapter and layer.
    """
    if safe_merge and (broken := [name for name, bound in bounds.items() if not math.isfinite(bound)]):
        raise ValueError(broken_adapter_message(broken[0]))
    limits = torch.finfo(dtype)
    half_step = limits.max * limits.eps / 4  # at most half the distance of the two largest numbers
    if sum(bounds.values()) < half_step:  # then no sum rounds up to inf
        return
    merged = weight().to(torch.promote_types(dtype, torch.float32))
    if not torch.isfinite(merged.to(dtype)).all():
        raise ValueError(
            f"The base weight of layer {layer_name!r} holds NaN or inf already, before adapter "
            f"{next(iter(deltas))!r} is merged into it: load the base model again."
        )
    for adapter_name, delta in deltas.items():
        merged = merged + delta().to(merged)
        if not (fits := torch.isfinite(merged.to(dtype))).all():
            words = f"{broken_adapter_message(adapter_name)}. " if safe_merge else ""
            raise ValueError(
                f"{words}Merging adapter {adapter_name!r} would make {int((~fits).sum())} of {fits.numel()} entries "
                f"of the weight of layer {layer_name!r} NaN or inf in {str(dtype).removeprefix('torch.')}. If the "
                "adapter is finite, merge into the base model in float32 or bfloat16; otherwise load an earlier "
                "checkpoint."
            )


def refuse_unknown(adapter_names: Iterable[str], known: Mapping[str, Any]) -> None:
    """Refuse to merge adapters that are not there, where PEFT would merge nothing.

    Raises:
        ValueError: naming them, and those that there are.
    """
    if unknown := [name for name in adapter_names if name not in known]:
        raise ValueError(
            f"There is no adapter {', '.join(map(repr, unknown))} to merge; the model has "
            f"{', '.join(map(repr, known)) or 'none'}."
        )


@contextmanager
def merged_or_not(model: nn.Module) -> Iterator[None]:
    """If merging fails half-way, unmerge the layers into which nothing was merged before."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.merged]
    try:
        yield
    except BaseException:
        for layer in layers:
            if layer.merged:
                with onload_layer(layer):
                    layer.unmerge()
        raise


def refuse_shared_modules(model: nn.Module, layers: Mapping[str, BaseTunerLayer]) -> None:
    """Refuse base layers that the model also calls by a name without an adapter, which a merge would change too.

    PEFT adapts a module that has two names under the first of them only.

    Raises:
        ValueError: naming both names.
    """
    names = {id(layer.get_base_layer()): name for name, layer in layers.items()}
    for parent_name, parent in model.named_modules():
        for child_name, child in children_by_name(parent).items():
            if id(child) in names and not isinstance(parent, BaseTunerLayer):
                second = f"{parent_name}.{child_name}" if parent_name else child_name
                raise ValueError(
                    f"The base layer of {names[id(child)]!r} is also the module {second!r}, which has no adapter and "
                    "would be changed by the merge. Give the model a copy of the module in one of the two places "
                    "before it is adapted, or export the adapter with export_lora."
                )


def refuse_inseparable(model: nn.Module, weights: Iterable[str]) -> None:
    """Refuse to merge for good into a tied weight, where the model could not be saved and loaded as it is then.

    Args:
        weights: the names in the model of what is merged into.

    Raises:
        ValueError: if the flag `tie_word_embeddings`, which has to be False then, means more than tying to the model.
    """
    for tied_model, tied in _tied_models(model, set(weights)):
        if _flag_means_more(tied_model):
            raise ValueError(
                f"The weight of layer {tied[0].removesuffix('.weight')!r} is tied to another of "
                f"{type(tied_model).__name__}, which computes something else when its config says "
                "tie_word_embeddings=False, as it has to after a merge. Leave the layer out with exclude_modules, or "
                "keep the adapter unmerged or export it with export_lora."
            )


def untie(model: nn.Module, weights: Iterable[str]) -> None:
    """Let models of transformers say that their tied weights are so no longer, after a merge into some of them.

    All of them get tensors of their own, since one flag stands for all when the model is loaded again.
    """
    for tied_model, _ in list(_tied_models(model, set(weights))):
        parameters = dict(tied_model.named_parameters(remove_duplicate=False))
        for name, source in tied_model.all_tied_weights_keys.items():
            tensor = parameters.get(name)
            if tensor is not None and tensor is parameters.get(source) and not tensor.is_meta:
                parent, _, leaf = name.rpartition(".")
                own = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
                setattr(tied_model.get_submodule(parent), leaf, own)
        tied_model.all_tied_weights_keys = {}
        _say_untied(tied_model.config)


def _tied_models(model: nn.Module, weights: set[str]) -> Iterator[tuple[PreTrainedModel, Sequence[str]]]:
    """The models of transformers in `model` in which one of the `weights` is tied, with those names.

    `all_tied_weights_keys` is transformers' own table of what is tied to what (5.0 and later, read in 5.23).
    """
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            pairs: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
            tied = {f"{prefix}.{name}" if prefix else name for name in (*pairs, *pairs.values())}
            if found := sorted(tied & weights):
                yield module, found


def _flag_means_more(model: PreTrainedModel) -> bool:
    """Whether `tie_word_embeddings` is read in a forward pass, or does not outlive saving and loading the config."""
    forwards = (inspect.unwrap(type(m).forward) for m in model.modules() if isinstance(m, PreTrainedModel))
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    if any(code is not None and "tie_word_embeddings" in code.co_names for code in codes):
        return True
    config = copy.deepcopy(model.config)
    _say_untied(config)
    return type(config).from_dict(config.to_dict()).to_dict() != config.to_dict()


def _say_untied(config: PretrainedConfig) -> None:
    """Set the flag to False, in the configs inside too: others than transformers read it there."""
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    for name in getattr(config, "sub_configs", {}):
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            _say_untied(inner)
