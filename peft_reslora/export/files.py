"""A saved adapter, exported from its files: its config and tensors, and whether these are all that was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.export.base import config_of_base, fitting_bases
from peft_reslora.export.checkpoint import PREFIX
from peft_reslora.export.factors import Factors, factorise
from peft_reslora.export.fitting import EXACT, Fit, FittedUpdate
from peft_reslora.export.patterns import refuse_slow_patterns
from peft_reslora.export.source import MERGE_INSTEAD, in_layer, refuse_config
from peft_reslora.export.targets import endings_of, linear_shape
from peft_reslora.mora import MoRAConfig
from peft_reslora.mora.operators import delta_weight, sharing_factors, square_size
from peft_reslora.names import bare_name
from peft_reslora.precision import full_precision
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.merge import (
    SHORTCUT_PARTS,
    blocks_from_state_dict,
    chains_of_blocks,
    layer_is_exact,
    merged_factors_from_state_dict,
)
from peft_reslora.saving import CONFIG_FILE, WEIGHTS_FILE, refuse_damaged

# What the file of an adapter holds for each layer; the last of the two own methods is the stamp of native files.
_PARTS = {
    "LORA": ("lora_A.weight", "lora_B.weight"),
    "MORA": ("mora_M", "mora_stamp"),
    "RESLORA": ("lora_A.weight", "lora_B.weight", "lora_norm", *SHORTCUT_PARTS, "lora_magnitude_vector"),
}
_WITH_BASE = "Export it with its base model instead: `peft-reslora export --base MODEL`, or export_lora(model)."
_LARGEST_CONFIG = 2**24  # bytes
_LARGEST_NUMBER = 2**31


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


def read_config(folder: Path) -> PeftConfig:
    """The config of a saved adapter, whoever wrote it.

    Raises:
        ValueError: naming the file that is missing, or what it holds that no config may.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist, so {folder} is not the folder of a saved adapter.")
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
        if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("it is no JSON object")
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None:
            raise ValueError("it names no peft_type")
        if faults := _faults(config):
            raise ValueError("; ".join(faults))
    except Exception as error:  # PEFT and json raise what the file makes them: KeyError, RecursionError and others
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{file} cannot be read as an adapter's config: {reason}") from error
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter, as they are in its file.

    Raises:
        ValueError: if the file is missing, damaged or empty, or has names that are none.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist; a folder with {CONFIG_FILE} and {WEIGHTS_FILE} is needed.")
    refuse_damaged(file)
    tensors = load_file(file)
    if not tensors:
        raise ValueError(f"{file} holds no tensors, so there is no adapter in it. Save the adapter again.")
    if strange := [key for key in tensors if not key.isprintable()]:
        raise ValueError(f"{file} has names that no layer has: {strange[0]!a}. It is no adapter of PEFT's.")
    return tensors


def read_adapter(folder: Path) -> SavedAdapter:
    """A saved adapter that can be exported from its files.

    Raises:
        ValueError: naming the file that is missing, damaged or of another kind; or what the adapter lacks.
    """
    config = read_config(folder)
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    if peft_type not in _PARTS:
        raise ValueError(
            f"{folder / CONFIG_FILE} has peft_type {peft_type!r}; from files alone, only {', '.join(_PARTS)} are "
            "exported. Load the adapter onto its base model and use export_lora."
        )
    refuse_config(config, folder.name)
    tensors = _by_layer(read_tensors(folder), _PARTS[peft_type], folder.name)
    base_config = config_of_base(config)
    found = iter(()) if base_config is None else fitting_bases(config, base_config, tensors)
    base = next((model for _, model in found), None)
    refuse_slow_patterns(config, [*tensors, *(() if base is None else (name for name, _ in base.named_modules()))])
    adapter = SavedAdapter(folder.name, config, tensors, base)
    refuse_uncovered(config, tensors, folder.name)
    _refuse_other_ranks(adapter)
    _refuse_missing(adapter, sealed=_is_sealed(folder / WEIGHTS_FILE))
    return adapter


@full_precision()
def updates_in_files(adapter: SavedAdapter, fit: Fit) -> dict[str, FittedUpdate]:
    """The update of every layer of a saved adapter, by the module's name in the base model.

    Raises:
        ValueError: naming adapter and layer, if one cannot be exported.
    """
    updates = {}
    for name, factors, merge in _factors_in_files(adapter, fit.approximate):
        with in_layer(adapter.name, name):
            updates[name] = fit.update(factors(), merge)
    return updates


def targets_in_files(config: Any, exported: list[str]) -> list[str]:
    """`target_modules` where the base model's other modules are not known.

    The adapter's own, if nothing but them decided which modules it has; the full names otherwise.
    """
    own = config.target_modules
    narrowed = config.exclude_modules or config.layers_to_transform is not None
    return sorted(exported if isinstance(own, str) or not own or narrowed else own)


def _factors_in_files(adapter: SavedAdapter, approximate: bool) -> Iterator[tuple[str, Callable[[], Factors], str]]:
    """Of every layer its name, what computes its factors, and how they come about."""
    config = adapter.config
    if isinstance(config, ResLoRAConfig):
        pairs = merged_factors_from_state_dict(config, adapter.state_dict())
        merges = _merges_in_files(config, adapter.state_dict())
        for name, (A, B) in pairs.items():
            yield name, lambda A=A, B=B: Factors.of(A, B), merges[name]  # type: ignore[misc]
    elif isinstance(config, MoRAConfig):
        modules = _modules_of_base(adapter)
        for name, parts in adapter.tensors.items():
            if "mora_M" not in parts:
                raise ValueError(f"Adapter {adapter.name!r}, layer {name!r}: its matrix is not in the file.")
            shape = linear_shape(modules[name])
            yield name, lambda M=parts["mora_M"], n=name, s=shape: _mora(config, n, M, s, approximate), EXACT  # type: ignore[misc]
    elif isinstance(config, LoraConfig):
        for name, parts in adapter.tensors.items():
            yield name, lambda n=name, p=parts: _lora(config, n, p), EXACT  # type: ignore[misc]


def _merges_in_files(config: ResLoRAConfig, state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """How each layer's update comes about: `EXACT`, or what estimates it."""
    blocks, merges = blocks_from_state_dict(config, state_dict), {}
    for chain in chains_of_blocks(config, blocks).chains:
        members = [blocks[target.name] for target in chain]
        for position, target in enumerate(chain):
            exact = layer_is_exact(members, position, config)
            merges[target.name] = EXACT if exact else f"estimated by {config.merge_estimator}"
    return merges


def _lora(config: LoraConfig, name: str, parts: Mapping[str, Tensor]) -> Factors:
    """s B A, of the rank and alpha that the config gives the layer."""
    if parts.keys() != set(_PARTS["LORA"]):
        raise ValueError(
            f"it has the tensors {', '.join(sorted(parts))} instead of {' and '.join(_PARTS['LORA'])}, so it is no "
            f"plain LoRA of a linear layer. {MERGE_INSTEAD}"
        )
    alpha = _by_pattern(config.alpha_pattern, name, config.lora_alpha)
    r = _by_pattern(config.rank_pattern, name, config.r)
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return Factors.of(parts["lora_A.weight"], parts["lora_B.weight"], scaling)


def _mora(config: MoRAConfig, name: str, M: Tensor, shape: tuple[int, int] | None, approximate: bool) -> Factors:
    """Of type 'sharing' the exact factors; of the others, which are full rank, the whole update."""
    if shape is None:
        raise ValueError(f"its base layer is not linear. {MERGE_INSTEAD}")
    r = _by_pattern(config.rank_pattern, name, config.r)
    mora_type = config.resolve_type(r)
    if tuple(M.shape) != (q := square_size(*shape, r, mora_type), q):
        raise ValueError(
            f"its matrix is {tuple(M.shape)}, and r={r} with {shape[0]} inputs and {shape[1]} outputs makes it "
            f"{(q, q)}: file, config and base do not match. {_WITH_BASE}"
        )
    M = M if M.dtype == torch.float64 else M.float()
    if mora_type == "sharing":
        return Factors.of(*sharing_factors(M, *shape))
    if not approximate:
        raise ValueError(
            f"with mora_type={mora_type!r} its update is full rank, so that no LoRA of a small rank equals it. Pass "
            "rank= or energy= (--rank, --energy) for the nearest LoRA, or merge it into the base model with "
            "merge_and_unload()"
        )
    return Factors.of(*factorise(delta_weight(M, *shape, mora_type)))


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's choice of the entry for a layer."""
    pattern = pattern or {}
    return pattern.get(get_pattern_key(list(pattern), name), default)


def _modules_of_base(adapter: SavedAdapter) -> dict[str, nn.Module]:
    """The modules of the base, which MoRA's files cannot do without: they hold only its square matrices.

    Raises:
        ValueError: if the base's config is not here, or makes no model with the adapter's layers.
    """
    if adapter.base is None:
        raise ValueError(
            f"Adapter {adapter.name!r} is MoRA, whose files do not hold the shapes of its layers; they are those of "
            f"the base model {adapter.config.base_model_name_or_path!r}, and no config of it that has these layers is "
            f"on this machine. Fetch it with `hf download MODEL config.json`. Or: {_WITH_BASE}"
        )
    return dict(adapter.base.named_modules())


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
        found = layers.setdefault(bare_name(key.removeprefix(PREFIX).removesuffix(f".{part}")), {})
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
        A, r = parts.get("lora_A.weight"), _by_pattern(config.rank_pattern, name, config.r)
        if A is not None and A.ndim == 2 and A.shape[0] != r:
            raise ValueError(
                f"Adapter {adapter.name!r}, layer {name!r}: its factors have rank {A.shape[0]}, and the config says "
                f"{r}: config and tensors are not of one adapter. Take both from one save."
            )


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
            f"whether all layers are in the file. {_WITH_BASE}"
        )
    if missing:
        raise ValueError(
            f"Adapter {adapter.name!r} lacks {len(missing)} layers that its config targets, {missing[0]!r} among "
            f"them. Save the adapter again. If the base model has no such layers: {_WITH_BASE}"
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


def _is_sealed(file: Path) -> bool:
    """Whether the file says what its tensors were when it was saved; `refuse_damaged` compares."""
    with safe_open(file, "pt") as opened:
        return "sha256" in (opened.metadata() or {})


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < _LARGEST_NUMBER


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST_NUMBER


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, (list, tuple, set)) and all(isinstance(name, str) for name in value))


def _is_indices(value: Any) -> bool:
    indices = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(i, int) and not isinstance(i, bool) for i in indices)


def _maps_to(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and all(isinstance(k, str) and check(v) for k, v in value.items()))
    )


# The fields that an export reads, and what they may be.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (_maps_to(_is_rank), "names with positive integers"),
    "alpha_pattern": (_maps_to(_is_number), "names with numbers"),
    "target_modules": (_is_names, "names or a regular expression"),
    "exclude_modules": (_is_names, "names or a regular expression"),
    "modules_to_save": (_is_names, "names"),
    "layers_to_transform": (_is_indices, "integers"),
    "layers_pattern": (_is_names, "names"),
    "chain_pattern": (_is_names, "regular expressions"),
    "norm_window": (_is_rank, "a positive integer"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "fan_in_fan_out": (lambda value: isinstance(value, bool), "true or false"),
    "base_model_name_or_path": (_is_text, "a name"),
    "revision": (_is_text, "a name"),
    "auto_mapping": (_maps_to(_is_text), "names"),
}


def _faults(config: PeftConfig) -> list[str]:
    """The fields of a config that are not what they may be."""
    held = {name: getattr(config, name) for name in _FIELDS if hasattr(config, name)}
    return [
        f"{name} must be {_FIELDS[name][1]}, not {_shortened(value)}"
        for name, value in held.items()
        if not _FIELDS[name][0](value)
    ]


def _shortened(value: Any) -> str:
    """The value as it may stand in a message; of a huge number only that it is huge."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "a number of more than 18 digits"
    text = (
        repr(value) if not isinstance(value, (dict, list, set, tuple)) else f"{type(value).__name__} {str(value)[:60]}"
    )
    return text if len(text) <= 80 else f"{text[:80]}..."
