"""`ResLoRAModel`: PEFT's LoRA tuner, whose layers are linked into chains after every injection."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraModel
from torch import nn

from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.cuts import own_config
from peft_reslora.reslora.layer import BUFFERS, ResLoRALayer, as_reslora_layer
from peft_reslora.reslora.linking import chains_of, combined_cuts, find_chains_before_injection, link_chains
from peft_reslora.reslora.merge import SHORTCUT_PARTS, is_exact
from peft_reslora.reslora.variant import Chain, restore, stored

logger = logging.getLogger(__name__)

_PREFIX = "base_model.model."
_PARTS = {"lora_A", "lora_B", *BUFFERS}


class ResLoRAModel(LoraModel):
    """Creates a ResLoRA model from a pretrained one (ResLoRA, arXiv 2402.18039).

    Everything but the chains is `LoraModel`. Use it through `get_peft_model(model, ResLoRAConfig(...))`.
    """

    peft_config: dict[str, ResLoRAConfig]  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name] = own_config(self.peft_config[adapter_name])
        if kwargs.get("state_dict") is None:
            find_chains_before_injection(model, config)  # refuses before the model is changed
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        link_chains(model, config, adapter_name)

    def _create_and_replace(
        self,
        lora_config: ResLoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        as_reslora_layer(getattr(parent, target_name), current_key)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        with self._planned_merge(adapter_names, safe_merge, keep_base_weights=True):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        nothing: AbstractContextManager[list[Chain]] = nullcontext([])
        plan = self._planned_merge(adapter_names, safe_merge, keep_base_weights=False) if merge else nothing
        with plan as chains:
            for name in dict.fromkeys(chain.adapter_name for chain in chains):
                logger.info(describe_merge([chain for chain in chains if chain.adapter_name == name]))
            return super()._unload_and_optionally_merge(  # type: ignore[return-value]  # PEFT annotates None
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    @contextmanager
    def _planned_merge(
        self, adapter_names: Sequence[str] | None, safe_merge: bool, keep_base_weights: bool
    ) -> Iterator[list[Chain]]:
        """Compute what a merge needs of all layers before it changes any, and refuse what cannot be merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        chains = [chain for name in names for chain in chains_of(self.model, name)]
        for chain in chains:
            broken = not all(torch.isfinite(b.A).all() and torch.isfinite(b.B).all() for b in chain.blocks())
            if broken and safe_merge:  # PEFT's own words for it
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {chain.adapter_name} seems to be broken"
                )
            for position in range(len(chain.layers) if broken else 0):
                chain.merged_factors(position)  # raises, and says which layer
        try:
            for chain in chains:
                chain.planned = chain.coefficients()
                chain.keeps_base_weights = keep_base_weights
            yield chains
        finally:
            for chain in chains:
                chain.planned = None
                chain.keeps_base_weights = True

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **kwargs: Any,
    ) -> None:
        """Combine adapters into a new one, as in `LoraModel`, in ways that hold for factors that are linked.

        Raises:
            ValueError: for combinations that take the SVD of delta weights, since the shortcuts would be applied to
                them again, and for adapters with different shortcuts.
        """
        if combination_type.endswith("svd") and len(adapters) > 1:
            raise ValueError(
                f"combination_type={combination_type!r} works on delta weights, to which the shortcuts of the new "
                "adapter would be applied a second time. Use 'cat' (exact) or 'linear', or export each adapter with "
                "save_as_lora and combine those."
            )
        linked = {(c.shortcut, c.pre_num) for c in (self.peft_config[a] for a in adapters if a in self.peft_config)}
        if len(linked) > 1:
            raise ValueError(
                f"The adapters {adapters} have different shortcuts, (shortcut, pre_num) {sorted(linked)}; one adapter "
                "cannot hold them all. Export each with save_as_lora and combine those."
            )
        annealed = [
            a for a in adapters for chain in chains_of(self.model, a) if any(b.annealed for b in chain.blocks())
        ]
        if annealed:
            raise ValueError(
                f"Adapter {annealed[0]!r} has been annealed, and the new one would have its shortcuts again. Export "
                "each with save_as_lora, which is exact for annealed adapters, and combine those."
            )
        _refuse_unequal_scalings(self.model, adapters)
        with combined_cuts(self.model, self.peft_config, adapters):
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type=combination_type, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ResLoRAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        with _room_for_estimates(model, adapter_name, state_dict):
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            check_checkpoint(model, adapter_name, remapped)
        return remapped


def describe_merge(chains: Sequence[Chain]) -> str:
    """One line on the merge of one adapter: exact, or by which estimator."""
    config, name = chains[0].config, chains[0].adapter_name
    linked = [chain for chain in chains if len(chain.layers) > 1]
    estimated = sum(len(chain.layers) - 1 for chain in linked if not is_exact(chain.blocks(), config))
    how = (
        "exactly"
        if estimated == 0
        else f"by merge_estimator={config.merge_estimator!r}, an estimate on {estimated} layers; "
        "merge_report(model, batches) says what it costs"
    )
    return f"Merging adapter {name!r} (shortcut={config.shortcut!r}) {how}."


def check_checkpoint(model: nn.Module, adapter_name: str, remapped: Mapping[str, torch.Tensor]) -> None:
    """Refuse a checkpoint whose adapter tensors are not exactly the model's, which PEFT only warns about.

    Args:
        model: the model with the adapter injected.
        adapter_name: the adapter that is loaded.
        remapped: the checkpoint, with the model's own keys.

    Raises:
        ValueError: listing missing, extra and misshapen tensors.
    """
    wanted = {
        f"{name}.{key}".removeprefix(_PREFIX): tuple(tensor.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, ResLoRALayer)
        for key, tensor in layer.state_dict().items()
        if key.split(".")[0] in _PARTS and adapter_name in key.split(".")
    }
    found = {
        key.removeprefix(_PREFIX): tuple(tensor.shape)
        for key, tensor in remapped.items()
        if not _PARTS.isdisjoint(key.split("."))
    }
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "not in the model": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{key} {found[key]} instead of {shape}" for key, shape in wanted.items() if found.get(key, shape) != shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in faults.items() if keys)
        raise ValueError(
            f"The checkpoint does not fit adapter {adapter_name!r} on this model: {listed}. Load it onto the base "
            "model it was trained on, with the config it was saved with."
        )


@contextmanager
def _room_for_estimates(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give the layers the buffers of C_n that a checkpoint brings, and take away those that it does not.

    The layers get back what they had if loading fails.
    """
    found = {key.removeprefix(_PREFIX) for key in state_dict}
    before: list[tuple[BufferDict, torch.Tensor | None]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, ResLoRALayer) or adapter_name not in layer.lora_norm:
            continue
        shortcut, calibrated, annealed = (f"{name}.{part}".removeprefix(_PREFIX) in found for part in SHORTCUT_PARTS)
        weight = layer.lora_A[adapter_name].weight
        rank, in_features = weight.shape
        shapes: list[tuple[int, ...] | None] = [None, None, None]
        if shortcut or calibrated or annealed:  # C_n comes with one of the other two
            shapes = [(rank, in_features), None if annealed else (2 * rank,), () if annealed else None]
        for buffers, shape in zip((getattr(layer, part) for part in SHORTCUT_PARTS), shapes, strict=True):
            before.append((buffers, stored(buffers, adapter_name)))
            restore(buffers, adapter_name, None if shape is None else torch.zeros(shape, device=weight.device))
    try:
        yield
    except ValueError:
        for buffers, buffer in before:
            restore(buffers, adapter_name, buffer)
        raise


def _refuse_unequal_scalings(model: nn.Module, adapters: Sequence[str]) -> None:
    for name in adapters:
        for chain in chains_of(model, name):
            if chain.config.shortcut == "middle" and len({layer.scaling[name] for layer in chain.layers}) > 1:
                raise ValueError(
                    f"Adapter {name!r} has different scalings within the chain of {chain.names[0]!r}, which "
                    "shortcut='middle' cannot carry over into a weighted adapter. Export it with save_as_lora first."
                )
