"""`ResLoRAModel`: PEFT's LoRA tuner, whose layers are linked into chains after every injection."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraModel
from torch import nn

from peft_reslora.checkpoints import NativeCheckpoints, Parts, adapted_layers, canonical, refuse_adapter_name
from peft_reslora.fields import refuse_slow_patterns
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.layer import ResLoRALayer, as_reslora_layer
from peft_reslora.reslora.linking import chains_of, find_chains_before_injection, link_chains
from peft_reslora.reslora.merge import SHORTCUT_PARTS, is_exact
from peft_reslora.reslora.variant import Chain, restore, stored

logger = logging.getLogger(__name__)


class ResLoRAModel(NativeCheckpoints, LoraModel):
    """Creates a ResLoRA model from a pretrained one (ResLoRA, arXiv 2402.18039).

    Everything but the chains is `LoraModel`. Use it through `get_peft_model(model, ResLoRAConfig(...))`.
    """

    peft_config: dict[str, ResLoRAConfig]  # type: ignore[assignment]
    stamped_layer_cls = ResLoRALayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_adapter_name(model, adapter_name, type(self))
        refuse_slow_patterns(self.peft_config[adapter_name], [name for name, _ in model.named_modules()])
        config = self.peft_config[adapter_name]
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
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type=combination_type, **kwargs)
        _settle_combination(self.model, adapter_name, self.peft_config[adapter_name])

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: ResLoRAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        config.estimate = _estimate_in(model, adapter_name)
        return remapped

    @classmethod
    def _make_room(cls, layers: Mapping[str, Any], adapter_name: str, found: Parts) -> Callable[[], None]:
        """Give the layers the buffers of the estimate that a checkpoint brings, and take away what it does not."""
        brought = {name: {part for part in SHORTCUT_PARTS if found[name][part] is not None} for name in layers}
        if lacking := [n for n, layer in layers.items() if not brought[n] and layer.awaits_estimate(adapter_name)]:
            raise ValueError(
                f"The config of adapter {adapter_name!r} says that it was annealed, but the checkpoint has no "
                f"estimate for layer {lacking[0]!r}. Load the config and the weights that were saved together."
            )
        before: list[tuple[BufferDict, torch.Tensor | None]] = []
        for name, layer in layers.items():
            buffers: list[BufferDict] = [getattr(layer, part) for part in SHORTCUT_PARTS]
            before += [(held, stored(held, adapter_name)) for held in buffers]
            for held in buffers:
                restore(held, adapter_name, None)
            if brought[name]:  # C_n comes with one of the other two
                estimate = "annealed" if "lora_annealed" in brought[name] else "calibrated"
                layer.make_room_for_estimate(adapter_name, estimate)

        def restore_all() -> None:
            for held, buffer in before:
                restore(held, adapter_name, buffer)

        return restore_all


def _estimate_in(model: nn.Module, adapter_name: str) -> Literal["calibrated", "annealed"] | None:
    """What estimate the adapter's layers hold."""
    layers = [layer for _, layer in adapted_layers(model, ResLoRALayer, adapter_name)]
    if any(adapter_name in layer.lora_annealed for layer in layers):
        return "annealed"
    return "calibrated" if any(adapter_name in layer.lora_calibrated for layer in layers) else None


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


def _settle_combination(model: nn.Module, adapter_name: str, config: ResLoRAConfig) -> None:
    """Let layers and config say what PEFT's combination of adapters has made, so that it can be saved and loaded.

    It takes over what the first adapter's config says of an estimate, says one rank for all layers, and leaves the
    factors those of a `rank_pattern` (read in 0.21.2).
    """
    config.estimate = None
    for name, layer in adapted_layers(model, ResLoRALayer, adapter_name):
        layer.check_loaded(adapter_name)  # nothing was: there is no estimate, and no stamp to come
        A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        rank = A.weight.shape[0]
        A.out_features = B.in_features = rank
        if rank == layer.r[adapter_name]:
            continue
        root = math.sqrt if config.use_rslora else float
        layer.r[adapter_name] = rank
        layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * root(rank)
        pattern = "^" + re.escape(canonical(name))
        config.rank_pattern = {**(config.rank_pattern or {}), pattern: rank}
        config.alpha_pattern = {**(config.alpha_pattern or {}), pattern: layer.lora_alpha[adapter_name]}


def _refuse_unequal_scalings(model: nn.Module, adapters: Sequence[str]) -> None:
    for name in adapters:
        for chain in chains_of(model, name):
            if chain.config.shortcut == "middle" and len({layer.scaling[name] for layer in chain.layers}) > 1:
                raise ValueError(
                    f"Adapter {name!r} has different scalings within the chain of {chain.names[0]!r}, which "
                    "shortcut='middle' cannot carry over into a weighted adapter. Export it with save_as_lora first."
                )
