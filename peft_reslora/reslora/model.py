"""`ResLoRAModel`: PEFT's LoRA tuner, whose layers are linked into chains after every injection."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn

from peft_reslora.reslora.blocks.adalora import SINGULAR_VALUES, AdaloraBlock
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.layer import ResLoRALayer, as_reslora_layer
from peft_reslora.reslora.linked_chain import Chain, planned
from peft_reslora.reslora.linking import (
    chains_of,
    combined_cuts,
    find_chains_before_injection,
    find_target_layers,
    link_chains,
    own_config,
)
from peft_reslora.reslora.merging.estimators import SHORTCUT_PARTS
from peft_reslora.reslora.parameter_layer import as_parameter_layer
from peft_reslora.reslora.passes import doorway_of, remove_doorways
from peft_reslora.reslora.rank_allocation import (
    stop_watching_training,
    update_and_allocate,
    watch_training,
    without_pruned,
)
from peft_reslora.shared.base_weights import (
    broken_adapter_message,
    merged_or_not,
    own_memory,
    refuse_inseparable,
    refuse_shared_modules,
    refuse_unknown,
    untie,
)
from peft_reslora.shared.checkpoints import NativeCheckpoints, Parts, adapted_layers, canonical, refuse_adapter_name
from peft_reslora.shared.fields import refuse_slow_patterns, shown
from peft_reslora.shared.first_pass import after_pass, stop_watching, watch_first_pass
from peft_reslora.shared.host import BufferDict, own_parameter, parameters_kept, pre_hooks, remove_hooks
from peft_reslora.shared.precision import full_precision
from peft_reslora.shared.targets import refuse_merged
from peft_reslora.shared.tensors import restore, stored
from peft_reslora.shared.undo import configs_kept, undone_on_failure

logger = logging.getLogger(__name__)


class ResLoRAModel(NativeCheckpoints, LoraModel):
    """Creates a ResLoRA model from a pretrained one (ResLoRA, arXiv 2402.18039).

    Everything but the chains is `LoraModel`. Use it through `get_peft_model(model, ResLoRAConfig(...))`.
    """

    peft_config: dict[str, ResLoRAConfig]  # type: ignore[assignment]
    stamped_layer_cls = ResLoRALayer

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        with configs_kept(model):
            super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        with undone_on_failure(self, model, adapter_name):
            refuse_adapter_name(model, adapter_name, type(self))
            refuse_slow_patterns(config, [name for name, _ in model.named_modules()])
            _refuse_allocated(config)
            targets = find_target_layers(model, config, kwargs.get("state_dict"))
            config = self.peft_config[adapter_name] = own_config(model, config, targets.layers)
            find_chains_before_injection(model, config, targets.layers)
            refuse_merged(model, adapter_name)
            targets.narrow(config)
            for layer in model.modules():  # an adapter of the same name starts anew, as in LoRA
                if isinstance(layer, ResLoRALayer):
                    layer.forget(adapter_name)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            link_chains(model, config, adapter_name)
            watch_first_pass(model)
            if config.total_step is not None:
                watch_training(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT calls the model's `forward` (read in 0.21.2), past the hooks by which a chain knows its forward pass.
        doorway = doorway_of(self.model)
        if doorway is None:
            return super().forward(*args, **kwargs)
        doorway.enter(self.model, ())
        try:
            output = super().forward(*args, **kwargs)
        finally:
            doorway.leave(self.model, (), None)
        after_pass(self.model)
        return output

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As in PEFT; a batch that is refused leaves no hooks behind, by which all later ones would be (0.21.2)."""
        mixed = kwargs.get("adapter_names") is not None
        before = {module: pre_hooks(module) for module in self.model.modules()} if mixed else {}
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        except BaseException:
            for module, kept in before.items():
                remove_hooks(module, [hook for hook in pre_hooks(module) if hook not in kept].__contains__)
            raise

    def update_and_allocate(self, global_step: int) -> None:
        """As in PEFT's AdaLoRA: allocate ranks, after each optimizer step and before zero_grad."""
        update_and_allocate(self.model, global_step)

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
        with _without_warning_of_groups(target), parameters_kept(_rewritten_by_peft(target)):
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )
        made = getattr(parent, target_name)
        if kwargs.get("parameter_name") is None:
            as_reslora_layer(made, current_key)
        elif isinstance(made, PeftParamWrapper):  # else one that was there takes another adapter
            as_parameter_layer(made)

    @full_precision()
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        layers = self._adapted_layers(adapter_names)
        with self._planned_merge(layers, adapter_names, safe_merge, keep_base_weights=True), merged_or_not(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    @full_precision()
    def unmerge_adapter(self) -> None:
        super().unmerge_adapter()

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return []  # PEFT would warn of them before a merge; here they get weights of their own (0.21.2)

    @full_precision()
    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        nothing: AbstractContextManager[list[Chain]] = nullcontext([])
        merging = self._adapted_layers(adapter_names) if merge else {}
        plan = self._planned_merge(merging, adapter_names, safe_merge, keep_base_weights=False) if merge else nothing
        weights = [layer.weight_name(name) for name, layer in merging.items()]
        refuse_inseparable(self.model, weights)
        with plan as chains:
            for name in dict.fromkeys(chain.adapter_name for chain in chains):
                logger.info(describe_merge([chain for chain in chains if chain.adapter_name == name]))
            unloaded: Any = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        remove_doorways(unloaded)
        stop_watching(unloaded)
        stop_watching_training(unloaded)
        untie(unloaded, weights)
        return unloaded

    def _adapted_layers(self, adapter_names: Sequence[str] | None) -> dict[str, ResLoRALayer]:
        """The layers into which the adapters, the active ones by default, are merged already or are to be merged.

        Raises:
            ValueError: for an adapter that the model does not have.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        refuse_unknown(names, self.peft_config)
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, ResLoRALayer) and (module.merged or module.adapters_to_merge(names))
        }

    @contextmanager
    def _planned_merge(
        self,
        layers: Mapping[str, ResLoRALayer],
        adapter_names: Sequence[str] | None,
        safe_merge: bool,
        keep_base_weights: bool,
    ) -> Iterator[list[Chain]]:
        """Compute what a merge into `layers` needs before it changes any, and refuse what cannot be merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        refuse_shared_modules(self.model, layers)
        chains = [chain for name in names for chain in chains_of(self.model, name)]
        for chain in chains:
            broken = not all(torch.isfinite(b.A).all() and torch.isfinite(b.B).all() for b in chain.blocks())
            if broken and safe_merge:
                raise ValueError(broken_adapter_message(chain.adapter_name))
            for position in range(len(chain.layers) if broken else 0):
                chain.merged_factors(position)  # raises, and says which layer
        with planned(chains):
            for layer in layers.values():
                layer.check_mergeable(layer.adapters_to_merge(names), safe_merge)
            own = set() if keep_base_weights else own_memory(self.model)
            weights = {id(m): own_parameter(m.get_base_layer(), m.parameter_name) for m in layers.values()}
            in_place = {layer for layer, weight in weights.items() if id(weight) in own}
            if not all(chain.kind.adds_up for chain in chains):  # such a block asks for the weight from before
                in_place = set()
            try:
                for chain in chains:
                    chain.keeps_base_weights, chain.merges_checked, chain.in_place = keep_base_weights, True, in_place
                yield chains
            finally:
                for chain in chains:
                    chain.keeps_base_weights, chain.merges_checked, chain.in_place = True, False, set()

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        **kwargs: Any,
    ) -> None:
        """Combine adapters into a new one, as in `LoraModel`, in ways that hold for factors that are linked.

        'cat', and a single adapter with a weight, give exactly the weighted sum of the adapters' updates. The others
        combine the factors A and B apart, as PEFT does.

        Raises:
            ValueError: for combinations that take the SVD of delta weights, since the shortcuts would be applied to
                them again, for adapters with different shortcuts or chains, and for weights that are no numbers.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already: delete it first, or take another name.")
        if len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights={weights!r} has to hold one finite number for each of the adapters {adapters}.")
        self._refuse_combination(adapters, combination_type)
        _refuse_unequal_scalings(self.model, adapters)
        try:
            with combined_cuts(self.model, self.peft_config, adapters):
                super().add_weighted_adapter(
                    adapters, weights, adapter_name, combination_type=combination_type, **kwargs
                )
            _settle_combination(self.model, adapter_name, self.peft_config[adapter_name])
        except BaseException:
            if adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    def _refuse_combination(self, adapters: Sequence[str], combination_type: str) -> None:
        if combination_type.endswith("svd") and len(adapters) > 1:
            raise ValueError(
                f"combination_type={combination_type!r} works on delta weights, to which the shortcuts of the new "
                "adapter would be applied a second time. Use 'cat' (exact) or 'linear', or export each adapter with "
                "save_as_lora and combine those."
            )
        for chain in (chain for adapter in adapters for chain in chains_of(self.model, adapter)):
            if getattr(chain.layers[0].get_base_layer(), "groups", 1) > 1:
                raise ValueError(
                    f"Layer {chain.names[0]!r} is a convolution in groups, whose factors PEFT's combinations would "
                    "put into other groups. Merge the adapters one after the other with merge_and_unload()."
                )
        linked = {(c.shortcut, c.pre_num) for c in (self.peft_config[a] for a in adapters if a in self.peft_config)}
        if len(linked) > 1:
            raise ValueError(
                f"The adapters {adapters} have different shortcuts, (shortcut, pre_num) {sorted(linked)}; one adapter "
                "cannot hold them all. Export each with save_as_lora and combine those."
            )
        if ada := [a for a in adapters if a in self.peft_config and self.peft_config[a].total_step is not None]:
            raise ValueError(
                f"Adapter {ada[0]!r} has AdaLoRA (total_step), whose factors E are not those of a sum. Export each "
                "with save_as_lora and combine those."
            )
        if dora := [a for a in adapters if a in self.peft_config and self.peft_config[a].use_dora]:
            raise ValueError(
                f"Adapter {dora[0]!r} has use_dora=True, whose norms are not those of a sum. Merge the adapters one "
                "after the other with merge_and_unload()."
            )
        annealed = [
            a for a in adapters for chain in chains_of(self.model, a) if any(b.annealed for b in chain.blocks())
        ]
        if annealed:
            raise ValueError(
                f"Adapter {annealed[0]!r} has been annealed, and the new one would have its shortcuts again. Export "
                "each with save_as_lora, which is exact for annealed adapters, and combine those."
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """As `NativeCheckpoints` has it, without directions that AdaLoRA has pruned.

        Raises:
            ValueError: if the model lacks a layer on which later ones of its chain depend, so that what it computes
                would not be that of the layers that are saved.
        """
        state_dict = without_pruned(model, adapter_name, state_dict)
        held = {id(layer) for _, layer in adapted_layers(model, ResLoRALayer, adapter_name)}
        for chain in chains_of(model, adapter_name):
            present = [chain.has(n) and id(chain.layer(n)) in held for n in range(len(chain))]
            if (first := present.index(False) if False in present else len(chain)) < sum(present):
                raise ValueError(
                    f"Layer {chain.names[first]!r} of adapter {adapter_name!r} is not in this model, but later layers "
                    "of its chain are, and they were trained with it. Save the whole model's adapter, or take away "
                    "the last blocks of the model only."
                )
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

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
        back = _make_room_for_directions(layers, adapter_name, found)
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
            back()
            for held, buffer in before:
                restore(held, adapter_name, buffer)

        return restore_all


def _rewritten_by_peft(target: nn.Module) -> list[nn.Module]:
    """The modules whose parameters PEFT would replace by others with the same numbers: an attention's (0.21.2)."""
    return [target, target.out_proj] if isinstance(target, nn.MultiheadAttention) else []


@contextmanager
def _without_warning_of_groups(target: nn.Module) -> Iterator[None]:
    """PEFT warns that convolutions in groups cannot be merged, which ours can."""
    if getattr(target, "groups", 1) == 1:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups > 1")
        yield


def _refuse_allocated(config: ResLoRAConfig) -> None:
    """Of a new adapter with AdaLoRA the ranks are still to be allocated."""
    if config.total_step is not None and config.rank_pattern and not config.stamped:
        raise ValueError(
            f"rank_pattern={shown(config.rank_pattern)} of a new adapter with total_step={config.total_step} "
            "(AdaLoRA), whose ranks are still to be allocated; rank_pattern keeps what was allocated in a training. "
            "Set config.rank_pattern = {} to train an adapter with this config."
        )


def _make_room_for_directions(layers: Mapping[str, Any], adapter_name: str, found: Parts) -> Callable[[], None]:
    """Give layers with AdaLoRA as many directions as a checkpoint brings, up to init_r; returns what undoes it.

    The ranks of the checkpoint also say whether they are allocated.
    """
    places = [layer.chain_of(adapter_name) for layer in layers.values()]
    chains = list({id(place[0]): place[0] for place in places if place is not None}.values())
    if not chains or not issubclass(chains[0].kind, AdaloraBlock):
        return lambda: None
    config = chains[0].config
    before = config.rank_pattern, [chain.allocation for chain in chains]
    undo: list[Callable[[], None]] = []
    ranks = {}
    for name, layer in layers.items():
        block, rank = layer.block_of(adapter_name), layer.r[adapter_name]
        A = found[name][block.factor_names[0]]
        fits = A is not None and A.ndim == block.weights[0].ndim and len(A) % block.groups == 0
        if fits and 0 < len(A) <= config.init_r and len(A) != rank:
            undo.append(block.resize(len(A)))
        ranks["^" + re.escape(name)] = layer.r[adapter_name]
    if config.rank_pattern != ranks:
        values = [found[name][SINGULAR_VALUES] for name in layers]  # with 'middle', all may keep all directions
        left = sum(int((E != 0).sum()) for E in values if E is not None)
        allocated = set(ranks.values()) != {config.init_r} or 0 < left <= config.target_r * len(layers)
        config.rank_pattern = ranks if allocated else {}
    for chain in chains:
        chain.allocation = None

    def undo_all() -> None:
        config.rank_pattern = before[0]
        for chain, allocation in zip(chains, before[1], strict=True):
            chain.allocation = allocation
        for resize_back in undo:
            resize_back()

    return undo_all


def _estimate_in(model: nn.Module, adapter_name: str) -> Literal["calibrated", "annealed"] | None:
    """What estimate the adapter's layers hold."""
    layers = [layer for _, layer in adapted_layers(model, ResLoRALayer, adapter_name)]
    if any(adapter_name in layer.lora_annealed for layer in layers):
        return "annealed"
    return "calibrated" if any(adapter_name in layer.lora_calibrated for layer in layers) else None


def describe_merge(chains: Sequence[Chain]) -> str:
    """One line on the merge of one adapter: exact, or by which estimator."""
    config, name = chains[0].config, chains[0].adapter_name
    estimated = sum(not layer.exact for chain in chains for layer in chain.merge().exactness)
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
    factors those of a `rank_pattern`. The factors hold the scalings of the adapters they are from, so that the new
    scaling is 1, which with use_rslora it is not (read in 0.21.2). Of nested ranks the order of directions is lost.
    """
    config.use_rslora, config.estimate, config.nested_ranks = False, None, False
    for name, layer in adapted_layers(model, ResLoRALayer, adapter_name):
        layer.check_loaded(adapter_name)  # nothing was: there is no estimate, and no stamp to come
        layer.use_rslora[adapter_name] = False
        layer.scaling[adapter_name] = config.lora_alpha / config.r
        block = layer.block_of(adapter_name)
        rank = block.weights[0].shape[0]
        block.set_rank(rank)
        if rank == layer.r[adapter_name]:
            continue
        layer.r[adapter_name] = rank
        layer.lora_alpha[adapter_name] = layer.scaling[adapter_name] * rank
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
