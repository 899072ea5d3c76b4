"""A saved adapter as its folder holds it, whoever wrote it: read, and refused where it is not whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.export.base import config_of_base, fitting_bases
from peft_reslora.export.checkpoint import DORA_PART
from peft_reslora.export.forms import NO_ATTENTION
from peft_reslora.export.source import MERGE_INSTEAD, is_dora, refuse_config
from peft_reslora.export.targets import endings_of, linear_shape
from peft_reslora.mora import MoRAConfig
from peft_reslora.mora.config import computation as mora_computation
from peft_reslora.reslora.blocks.adalora import SINGULAR_VALUES
from peft_reslora.reslora.blocks.dora import MAGNITUDE
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.merging.estimators import SHORTCUT_PARTS, blocks_from_state_dict, chains_of_blocks
from peft_reslora.shared import fields
from peft_reslora.shared.files import CONFIG_FILE, WEIGHTS_FILE, read_config, read_tensors, seal_of
from peft_reslora.shared.names import OUT_PROJECTION, PREFIX, bare_name
from peft_reslora.shared.patterns import by_pattern
from peft_reslora.shared.stamps import fault_against

# What the file of an adapter holds for each layer; of native adapters also a stamp (`stamps.py`).
_STAMPS = {"MORA": "mora_stamp", "RESLORA": "lora_magnitude_vector"}
PARTS = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "MORA": ("mora_M", _STAMPS["MORA"]),
    "RESLORA": ("lora_A.weight", "lora_B.weight", "lora_norm", *SHORTCUT_PARTS, _STAMPS["RESLORA"]),
}
FETCH = "To have it here, run `hf download MODEL config.json`."
WITH_BASE = "Or export it with its base model: `peft-reslora export --base MODEL`, export_lora(model)."
_MOST_PATTERNS = 4096  # each is compiled, and tried on each layer


@dataclass(frozen=True)
class SavedAdapter:
    """What the folder of an adapter holds.

    Args:
        name: of the folder.
        config: the adapter's.
        tensors: by the layer's name in the bare model, and the part of the layer.
        base: the base model without weights, where its config is on this machine; else None.
    """

    name: str
    config: PeftConfig
    tensors: dict[str, dict[str, Tensor]]
    base: nn.Module | None

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under the names of the bare model."""
        return {f"{layer}.{part}": tensor for layer, parts in self.tensors.items() for part, tensor in parts.items()}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the layers are Conv1D; LoRA's config says so, and of MoRA's layers the base."""
        layers = {} if self.base is None else dict(self.base.named_modules())
        own = getattr(self.config, "fan_in_fan_out", False)
        return bool(own) or any(isinstance(layers.get(name), Conv1D) for name in self.tensors)


def parts_of(config: PeftConfig) -> tuple[str, ...]:
    """The parts that an adapter with this config may hold for each layer."""
    parts = PARTS[str(getattr(config.peft_type, "value", config.peft_type))]
    if isinstance(config, ResLoRAConfig) and config.total_step is not None:
        return (*parts[:2], SINGULAR_VALUES, *parts[2:])
    if is_dora(config):
        return (*parts[:2], MAGNITUDE, *parts[2:]) if isinstance(config, ResLoRAConfig) else (*parts, DORA_PART)
    return parts


def read_adapter(folder: Path, allow_dora: bool = False) -> SavedAdapter:
    """A saved adapter that can be exported from its files.

    Args:
        allow_dora: it may have DoRA's norms.

    Raises:
        ValueError: naming the file that is missing, damaged or of another kind; or what the adapter lacks.
    """
    config = read_config(folder)
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    if peft_type not in PARTS:
        raise ValueError(
            f"{folder / CONFIG_FILE} has peft_type {peft_type!r}; from files alone, only {', '.join(PARTS)} are "
            "exported. Load the adapter onto its base model and use export_lora."
        )
    refuse_config(config, folder.name, allow_dora)
    tensors = _by_layer(read_tensors(folder), parts_of(config), folder.name)
    base_config = config_of_base(config)
    found = iter(()) if base_config is None else fitting_bases(config, base_config, tensors)
    base = next((model for _, model in found), None)
    refuse_patterns(config, [*tensors, *(() if base is None else (name for name, _ in base.named_modules()))])
    adapter = SavedAdapter(folder.name, config, tensors, base)
    refuse_uncovered(config, tensors, folder.name)
    _refuse_other_ranks(adapter)
    _refuse_missing(adapter, sealed=seal_of(folder / WEIGHTS_FILE) is not None)
    _refuse_other_stamps(adapter, peft_type)
    return adapter


def _by_layer(
    state_dict: Mapping[str, Tensor], parts: tuple[str, ...], adapter_name: str
) -> dict[str, dict[str, Tensor]]:
    """The tensors by layer and part, under the names of the bare model."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in state_dict.items():
        part = next((part for part in parts if key.endswith(f".{part}")), None)
        if part is None:
            others.append(key)
            continue
        name = bare_name(key.removeprefix(PREFIX).removesuffix(f".{part}"))
        if name.endswith(OUT_PROJECTION):
            layer = name.removesuffix(OUT_PROJECTION)
            raise ValueError(f"Adapter {adapter_name!r}, layer {layer!r}: {NO_ATTENTION}. {MERGE_INSTEAD}")
        found = layers.setdefault(name, {})
        if part in found:
            raise ValueError(f"Adapter {adapter_name!r} holds the tensor {key} twice, under two names of one layer.")
        found[part] = tensor
    if others:
        raise ValueError(
            f"Adapter {adapter_name!r} holds more than {'MoRA matrices' if parts[0] == 'mora_M' else 'LoRA factors'} "
            f"({', '.join(others[:3])}): modules_to_save, new tokens, embeddings or copies of base weights fit into "
            f"no plain LoRA. {MERGE_INSTEAD}"
        )
    return layers


def refuse_patterns(config: Any, layers: Collection[str]) -> None:
    """Refuse patterns that are no regular expressions, are too many, or take too long on these names.

    Raises:
        ValueError: naming field and pattern.
    """
    for name in ("rank_pattern", "alpha_pattern"):
        if len(held := getattr(config, name, None) or {}) > _MOST_PATTERNS:
            raise ValueError(f"{name} has {len(held):,} entries, and from files at most {_MOST_PATTERNS:,} are read.")
    if hasattr(config, "layers_pattern"):  # a method that adapts layers by their names
        fields.refuse(config, fields.pattern_faults(config))
        fields.refuse_slow_patterns(config, layers)


def refuse_uncovered(config: Any, layers: Collection[str], adapter_name: str) -> None:
    """Refuse tensors of layers that the config does not target: PEFT would leave them out without a word.

    Raises:
        ValueError: naming such a layer.
    """
    if config.target_modules in (None, "all-linear"):  # PEFT asks the base model
        return
    if outside := [name for name in layers if not check_target_module_exists(config, name)]:
        raise ValueError(
            f"Adapter {adapter_name!r} holds tensors of {len(outside)} layers that its config does not target, "
            f"{outside[0]!r} among them: config and tensors are not of one adapter. Take both from one save."
        )


def _refuse_other_ranks(adapter: SavedAdapter) -> None:
    """Refuse factors of another rank than the config gives the layer, from which their scaling comes."""
    config: Any = adapter.config
    for name, parts in adapter.tensors.items():
        A, r = parts.get("lora_A.weight"), by_pattern(config.rank_pattern, name, config.r)
        if A is not None and A.ndim == 2 and A.shape[0] != r:
            raise ValueError(
                f"Adapter {adapter.name!r}, layer {name!r}: its factors have rank {A.shape[0]}, and the config says "
                f"{r}: config and tensors are not of one adapter. Take both from one save."
            )


def _refuse_other_stamps(adapter: SavedAdapter, peft_type: str) -> None:
    """Refuse tensors that are not those for which their stamps stand, or stand for with another config."""
    for name, computation in _computations(adapter):
        parts = adapter.tensors[name]
        if (stamp := parts.get(_STAMPS[peft_type])) is None:  # saved by 0.1.0
            continue
        own = parts_of(adapter.config)[:-1]
        fault = fault_against(stamp, {part.removesuffix(".weight"): parts.get(part) for part in own}, computation)
        if fault is not None:
            raise ValueError(
                f"Adapter {adapter.name!r}, layer {name!r}: {fault}. Config and tensors are not of one save, or the "
                "file lacks layers. Take both from one save."
            )


def _computations(adapter: SavedAdapter) -> Iterator[tuple[str, str]]:
    """By layer what decides, besides its tensors, what it computes; as the layers say it."""
    config = adapter.config
    if isinstance(config, MoRAConfig):
        for name in adapter.tensors:
            yield name, mora_computation(config.resolve_type(by_pattern(config.rank_pattern, name, config.r)))
    if isinstance(config, ResLoRAConfig):
        blocks = blocks_from_state_dict(config, adapter.state_dict())
        for chain in chains_of_blocks(config, blocks).chains:
            for position, target in enumerate(chain):
                alpha = by_pattern(config.alpha_pattern, target.name, config.lora_alpha)
                yield target.name, config.computation(target.rank, alpha, position)


def _refuse_missing(adapter: SavedAdapter, sealed: bool) -> None:
    """Refuse an adapter that lacks layers: exported without them, it would be another one.

    The base model tells which layers there are. Where it is not here, the seal of the file tells that it is whole;
    where there is none, of a LoRA the numbers of its blocks are looked at.

    Raises:
        ValueError: naming a layer that is missing, or saying that nobody can know.
    """
    config: Any = adapter.config
    if adapter.base is not None and config.target_modules not in (None, "all-linear"):
        modules = adapter.base.named_modules()
        targeted = (n for n, m in modules if check_target_module_exists(config, n) and linear_shape(m) is not None)
        missing = [name for name in targeted if name not in adapter.tensors]
    elif sealed:
        return
    elif isinstance(config, LoraConfig) and not isinstance(config, ResLoRAConfig):
        missing = _gaps(config, list(adapter.tensors))
    else:
        raise ValueError(
            f"The file of adapter {adapter.name!r} has no seal, and no config of its base model "
            f"{config.base_model_name_or_path!r} that has its layers is on this machine, so that nothing shows "
            f"whether all layers are in the file. {FETCH} {WITH_BASE}"
        )
    if missing:
        raise ValueError(
            f"Adapter {adapter.name!r} lacks {len(missing)} layers that its config targets, {missing[0]!r} among "
            f"them. Save the adapter again. If the base model has no such layers, its config shows that. {FETCH} "
            f"{WITH_BASE}"
        )


def _gaps(config: LoraConfig, names: list[str]) -> list[str]:
    """What a list of targets would reach in a regular base: the layers of one role are in all blocks of a stack."""
    targets: Any = config.target_modules
    if not targets or isinstance(targets, str) or config.exclude_modules or config.layers_to_transform is not None:
        return []
    endings = {ending for name in names for ending in endings_of(name)}
    if single := [target for target in targets if _block_numbers(target)]:
        return [target for target in single if target not in endings]
    roles: dict[tuple[str, str], set[int]] = {}  # the path to the block's number and the path from there, the numbers
    for name in names:
        if len(numbers := _block_numbers(name)) == 1:
            stack, _, rest = f".{name}".partition(f".{numbers[0]}.")
            roles.setdefault((stack, rest), set()).add(int(numbers[0]))
    blocks = {stack: max(max(found) for (other, _), found in roles.items() if other == stack) for stack, _ in roles}
    return [
        f"{stack}.{number}.{rest}".removeprefix(".")
        for (stack, rest), found in roles.items()
        for number in range(min(blocks[stack], len(names)) + 1)
        if number not in found
    ]


def _block_numbers(name: str) -> list[str]:
    """The numbers on the way to a module, its own name left out."""
    return [part for part in name.split(".")[:-1] if part.isdecimal()]
