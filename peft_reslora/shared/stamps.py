"""Stamps: by which a layer knows that what was loaded into it is what was saved, and for the same computation.

A saved adapter holds, beside the tensors of each layer, one more tensor with digests of them and of what else decides
what the layer computes. It goes wherever the tensors go, through every program that saves and loads them.

Its numbers are whole and below 256, so that a cast to any half precision keeps them; and they are a checksum of
themselves, so that a stamp through which arithmetic has passed (a mean of two state dicts) is none at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import nn

from peft_reslora.shared.digests import digest_of, sha256
from peft_reslora.shared.host import BufferDict, remove_hooks

STAMP_NAMES = ("lora_magnitude_vector", "mora_stamp")  # of ResLoRA, see there, and of MoRA

_SIZE = 8  # bytes of each digest
_HALVES = (torch.bfloat16, torch.float16)
_PER_PART = 1 + len(_HALVES)
_PLACES = {torch.float32: 0, **{half: 1 + n for n, half in enumerate(_HALVES)}}  # of a tensor's own digest, by dtype
_NONE_KNOWN: Mapping[str, bytes | None] = MappingProxyType({})


def stamp_size(parts: int) -> int:
    """How many numbers the stamp of a layer with so many parts has."""
    return _SIZE * (2 + _PER_PART * parts)


def make_stamp(parts: Mapping[str, torch.Tensor | None], computation: str) -> torch.Tensor:
    """The stamp `(1, stamp_size(len(parts)))` of a layer.

    Two dimensions, so that it has the shape of no vector; it stands where a LoRA would have DoRA's magnitudes.

    Args:
        parts: the layer's tensors by name, always the same names; None for one that this adapter has not.
        computation: what else decides what the layer computes, in words.
    """
    content = _sha(computation.encode())
    for tensor in parts.values():
        content += bytes(_SIZE * _PER_PART) if tensor is None else b"".join(_digests(tensor))
    return torch.tensor([[*(_sha(content) + content)]], dtype=torch.float32)


def fault_against(
    stamp: torch.Tensor,
    parts: Mapping[str, torch.Tensor | None],
    computation: str,
    known: Mapping[str, bytes | None] = _NONE_KNOWN,
) -> str | None:
    """What is wrong with a layer by its stamp; None if nothing is, or if the stamp is none.

    A tensor may have been cast to half precision, or back, since it was stamped.

    Args:
        stamp: the layer's.
        parts: as in `make_stamp`.
        computation: as in `make_stamp`.
        known: by the names of parts, what `digest_of` gives for these tensors, where that is known already.
    """
    content = _content(stamp, len(parts))
    if content is None:
        return None
    if content[:_SIZE] != _sha(computation.encode()):
        return f"it was saved from another computation than this one ({computation})"
    for n, (name, tensor) in enumerate(parts.items()):
        start = _SIZE * (1 + _PER_PART * n)
        saved = [content[i : i + _SIZE] for i in range(start, start + _SIZE * _PER_PART, _SIZE)]
        if (tensor is None) != (not any(map(any, saved))):
            return f"{name} is {'missing' if tensor is None else 'there and was not saved with it'}"
        if tensor is not None and _is_whole(tensor) and not _is_saved(tensor, saved, known.get(name)):
            return f"{name} is not what was saved"
    return None


def is_stamp(stamp: torch.Tensor, parts: int) -> bool:
    """Whether the tensor is a stamp as it was made, and neither empty nor the result of a computation."""
    return _content(stamp, parts) is not None


def can_be_stamped(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are in it: not on the meta device, not sharded over processes."""
    return _is_whole(tensor)


def _content(stamp: torch.Tensor, parts: int) -> bytes | None:
    """What follows the checksum, if that is right."""
    if not _is_whole(stamp) or stamp.numel() != stamp_size(parts):
        return None
    numbers = stamp.detach().cpu().flatten().double()
    if not bool(((numbers >= 0) & (numbers < 256) & (numbers == numbers.floor())).all()):
        return None
    data = numbers.to(torch.uint8).numpy().tobytes()
    return data[_SIZE:] if data[:_SIZE] == _sha(data[_SIZE:]) else None


def _digests(tensor: torch.Tensor) -> list[bytes]:
    """Of the tensor as it is, and of what a cast to each half precision makes of it."""
    values = tensor.detach().cpu()
    return [_digest(_narrow(values)), *(_digest(values.to(half)) for half in _HALVES)]


def _is_saved(tensor: torch.Tensor, saved: list[bytes], known: bytes | None) -> bool:
    place = _PLACES.get(tensor.dtype)
    if known is not None and place is not None and known[:_SIZE] == saved[place]:
        return True
    values = tensor.detach().cpu()
    if _digest(_narrow(values)) == saved[0]:
        return True
    casts = ((half, values.to(half)) for half in _HALVES)
    return any(
        torch.equal(cast.to(values.dtype), values) and _digest(cast) == digest
        for (_, cast), digest in zip(casts, saved[1:], strict=True)
    )


def _narrow(values: torch.Tensor) -> torch.Tensor:
    """In float32, unless that loses something."""
    narrow = values.float()
    return values if values.dtype == torch.float64 and not torch.equal(narrow.double(), values) else narrow


def _digest(values: torch.Tensor) -> bytes:
    return digest_of(values)[:_SIZE]


def _sha(data: bytes) -> bytes:
    return sha256(data)[:_SIZE]


def _is_whole(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


class Arrivals:
    """What all layers of one adapter, which share this, have seen of their stamps when they were first used.

    A file that lacks all of a layer's entries lacks its stamp too, which only those of other layers show.
    """

    def __init__(self) -> None:
        self.stamped = False
        self.bare: str | None = None  # the title of a layer whose stamp has not come

    def fault(self, title: str, stamp: torch.Tensor) -> str | None:
        """Count in a layer's stamp; what is wrong with the adapter, if that shows it."""
        if _is_whole(stamp):
            if stamp.any():
                self.stamped = True
            else:
                self.bare = self.bare or title
        if not self.stamped or self.bare is None:
            return None
        return f"its other layers came with stamps, and nothing came for layer {self.bare!r}"


class StampedLayer(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """What a layer of either tuner does about stamps.

    An adapter whose config says that its file has stamps gets an empty one when it is injected, for the loader to
    fill, whichever loader that is. PEFT's is checked before it changes anything (`checkpoints.py`); what another one
    has filled in is checked when the adapter is first used. Then the stamp is gone.
    """

    stamp_name: str  # the attribute that holds the stamps
    part_names: tuple[str, ...]  # the attributes that may hold what belongs to an adapter, and is stamped
    r: dict[str, int]  # by adapter
    arrivals: dict[str, Arrivals]  # by adapter
    called_adapters: set[str]  # that have taken part in a forward pass
    _checked_by_compiler: set[str]  # adapters that were compared with their stamps while a graph was traced

    def stamped_parts(self, adapter_name: str) -> dict[str, torch.Tensor | None]:
        """The tensors that belong to the adapter on this layer, by names that all adapters of its kind have."""
        raise NotImplementedError

    def computation(self, adapter_name: str) -> str:
        """What besides the tensors decides what the adapter computes on this layer."""
        raise NotImplementedError

    def accepted_computations(self, adapter_name: str) -> list[str]:
        """Those for which a checkpoint may have been saved that is loaded into this layer."""
        return [self.computation(adapter_name)]

    def note_call(self, adapter_name: str) -> None:
        """The adapter takes part in a forward pass."""
        if not torch.compiler.is_compiling():
            self.called_adapters.add(adapter_name)

    def layer_title(self, adapter_name: str) -> str:
        """The layer's name, for messages."""
        raise NotImplementedError

    def awaits_estimate(self, adapter_name: str) -> bool:
        """Whether the adapter's config promised an estimate that has not come."""
        return False

    def await_stamp(self, adapter_name: str) -> None:
        """Make a place for the stamp of an adapter that is about to be loaded."""
        parts = self.stamped_parts(adapter_name)
        device = next(tensor.device for tensor in parts.values() if tensor is not None)
        device = torch.device("cpu") if device.type == "meta" else device  # PEFT cannot move it from there
        stamps: BufferDict = getattr(self, self.stamp_name)
        self._checked_by_compiler.discard(adapter_name)
        if not stamps:
            self.register_forward_pre_hook(check_when_used)
        stamps[adapter_name] = torch.zeros(1, stamp_size(len(parts)), device=device)

    def check_loaded(self, adapter_name: str) -> None:
        """Compare what was loaded with the stamp that came with it, once.

        Raises:
            RuntimeError: if it is not what was saved, or not for this computation, or an estimate has not come.
        """
        stamps: BufferDict = getattr(self, self.stamp_name)
        if adapter_name not in stamps:
            return
        if adapter_name not in self._checked_by_compiler:
            self._refuse_unlike_stamp(adapter_name, stamps[adapter_name])
        self.forget_stamp(adapter_name)

    def _refuse_unlike_stamp(self, adapter_name: str, stamp: torch.Tensor) -> None:
        fault = fault_against(stamp, self.stamped_parts(adapter_name), self.computation(adapter_name))
        fault = self.arrivals[adapter_name].fault(self.layer_title(adapter_name), stamp) or fault
        if self.awaits_estimate(adapter_name):
            fault = "its config says that it was annealed, and no estimate was loaded"
        if fault is not None:
            raise RuntimeError(
                f"What was loaded as adapter {adapter_name!r} into layer {self.layer_title(adapter_name)!r} cannot be "
                f"used: {fault}. Load it again from a whole copy, with the config it was saved with. To train a new "
                "adapter with the config of a saved one, set config.stamped = False (and config.estimate = None)."
            )

    def forget_stamp(self, adapter_name: str) -> None:
        """The adapter has been checked, or is of no interest any more."""
        stamps: BufferDict = getattr(self, self.stamp_name)
        self._checked_by_compiler.discard(adapter_name)
        if adapter_name in stamps:
            del stamps[adapter_name]


def check_when_used(layer: nn.Module, args: object) -> None:
    """A forward pre-hook, until all adapters have been checked; those that are neither loaded nor active wait."""
    if not isinstance(layer, StampedLayer):
        return
    if torch.compiler.is_compiling():
        _check_while_tracing(layer)
        return
    stamps: BufferDict = getattr(layer, layer.stamp_name)
    for adapter_name in _due(layer):
        layer.check_loaded(adapter_name)
    if not stamps:
        remove_hooks(layer, lambda hook: hook is check_when_used)


@torch.compiler.assume_constant_result  # runs as it is when a graph is traced, and is not in the graph
def _check_while_tracing(layer: StampedLayer) -> None:
    """Check without changing what the compiler looks at; the stamps go with the first use outside of its graphs."""
    for adapter_name in _due(layer):
        layer._refuse_unlike_stamp(adapter_name, getattr(layer, layer.stamp_name)[adapter_name])
        layer._checked_by_compiler.add(adapter_name)


def _due(layer: StampedLayer) -> list[str]:
    """The adapters that are to be checked now."""
    stamps: BufferDict = getattr(layer, layer.stamp_name)
    active = () if layer.disable_adapters else layer.active_adapters
    unchecked = stamps.keys() - layer._checked_by_compiler if torch.compiler.is_compiling() else stamps
    return [name for name in unchecked if name in active or stamps[name].any()]
