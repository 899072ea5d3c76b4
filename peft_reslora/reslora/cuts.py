"""Cuts: where chains have to end that names and shapes would link, found on the model.

They are found once, when an adapter is made, and stand in its config from then on (`ResLoRAConfig.chain_cuts`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora.reslora.chain_table import (
    EMBEDDING,
    ChainTable,
    Target,
    chain_settings,
    cuts_by_number,
    find_chains,
    kept_cuts,
    kernel_kind,
    shortest_cuts,
)
from peft_reslora.reslora.config import AUTO, BY_NUMBER, ResLoRAConfig
from peft_reslora.reslora.target_parameters import parameters_beside
from peft_reslora.shared.host import Convolution, in_out_features
from peft_reslora.shared.names import OUT_PROJECTION, PREFIX, bare_name

# Lists of such names hold what works side by side, on one input or each on its own: output heads, embeddings of boxes
# and classes, projections and mergers of several inputs. An nn.Sequential of such a name runs one after the other.
_SIDE_BY_SIDE = re.compile(r"head|embed|proj|merger|hypernetwork|output|adapter|confidence|assignment|lqe|controlnet")


class FoundCuts(list[str]):
    """Cuts that were found on a model of this process; where the config is used again, they are found anew."""


def is_new(config: ResLoRAConfig) -> bool:
    """Whether the adapter's chains are still to be found on the model it is injected into."""
    return config.chain_cuts == AUTO or isinstance(config.chain_cuts, FoundCuts)


def replace_cuts(config: ResLoRAConfig) -> ResLoRAConfig:
    """A copy of the config whose cuts are still to be found."""
    config = copy.copy(config)
    config.chain_cuts = AUTO
    return config


def cuts_of(config: ResLoRAConfig, targets: Sequence[Target]) -> dict[str, str]:
    """The layers at which the chains of an adapter end, by its config alone.

    Raises:
        ValueError: if the config was never injected, or is that of an adapter with other layers.
    """
    if config.chain_cuts == BY_NUMBER:
        return cuts_by_number(targets, config.chain_pattern)
    if not isinstance(config.chain_cuts, list):
        raise ValueError(
            f"chain_cuts={config.chain_cuts!r} in the adapter's config, which was not saved with the adapter: only "
            "the model tells where its chains end. Load the adapter onto its model and save it again."
        )
    return kept_cuts(config.chain_cuts, targets)


def cuts_to_keep(model: nn.Module, config: ResLoRAConfig, targets: Sequence[Target]) -> FoundCuts:
    """The cuts of a new adapter, as its config keeps them.

    Raises:
        ValueError: as `refuse_moved_rows`.
    """
    cuts = find_cuts(model, targets, config.chain_pattern)
    table = find_chains(targets, *chain_settings(config), cuts)
    refuse_moved_rows(model, table)
    return FoundCuts(shortest_cuts({link.after for link in table.missing if link.after in cuts}, table))


def find_cuts(
    model: nn.Module, targets: Sequence[Target], chain_pattern: Sequence[str] | str | None
) -> dict[str, str]:
    """The layers at which chains of `targets` have to end in this model, and why.

    Between two layers of one chain, the model has no other layer of their role and shape; tokens that run through the
    first one run through the second; and the second comes after the first, not beside it. Where a `chain_pattern` says
    what is linked, only the tokens count.
    """
    modules = {bare_name(name, model).removeprefix(PREFIX): module for name, module in model.named_modules()}
    patterns = [chain_pattern] if isinstance(chain_pattern, str) else list(chain_pattern or ())
    targeted = {target.name for target in targets}
    beside = parameters_beside(modules, [target for target in targets if target.name not in modules])
    others = (layer for layer in (*_linear_layers(modules), *beside) if layer.name not in targeted)
    layers = [*targets, *(layer for layer in others if not _matches(patterns, layer.name))]
    shared = _first_without_keys(modules)
    cuts = {}
    for chain in find_chains(layers, "block", 1, patterns).chains:
        for before, after in pairwise(target.name for target in chain):
            if after not in targeted:
                continue
            if before not in targeted:
                cuts[after] = f"layer {before} lies between and is not targeted"
            elif differing := _other_steps(modules, before, after):
                cuts[after] = f"the convolutions differ in {differing}"
            elif _tokens_stop(shared, before, after):
                cuts[after] = "the model reuses earlier keys here, and may go on with the last tokens only"
            elif not _matches(patterns, after) and _side_by_side(modules, before, after):
                cuts[after] = f"the members of {_parting(before, after)} work side by side"
    return cuts


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _linear_layers(modules: Mapping[str, nn.Module]) -> Iterator[Target]:
    """The linear layers and convolutions of the base model, whether or not they are adapted."""
    inside: list[str] = []
    for name, module in modules.items():
        parts = name.split(".")
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue  # the original module inside it counts
        if "modules_to_save" in parts or (inside and name.startswith(inside[-1])):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{name}.")
            module = module.get_base_layer()
        if (shape := _shape_of(module)) is not None:
            # PEFT's wrappers of modules that are trained whole keep the original under this name.
            bare = ".".join(part for part in parts if part != "original_module")
            yield from targets_of(bare, module, shape, rank=0)


def targets_of(name: str, base_layer: nn.Module, shape: tuple[int, int], rank: int) -> list[Target]:
    """`target_of`, and of an attention, whose out_proj has blocks of its own, that one too."""
    found = [target_of(name, base_layer, shape, rank)]
    if isinstance(base_layer, nn.MultiheadAttention):
        found.append(Target(name + OUT_PROJECTION, base_layer.embed_dim, base_layer.embed_dim, rank))
    return found


def target_of(name: str, base_layer: nn.Module, shape: tuple[int, int], rank: int) -> Target:
    """A layer as chains see it; `shape` is its in_features and out_features."""
    if not isinstance(base_layer, Convolution):
        return Target(name, *shape, rank, EMBEDDING if isinstance(base_layer, nn.Embedding) else "")
    return Target(name, base_layer.in_channels, base_layer.out_channels, rank, kernel_kind(base_layer.kernel_size))


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Convolution):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, 3 * module.embed_dim
    if isinstance(module, nn.Linear | Conv1D) or hasattr(module, "infeatures"):
        in_features, out_features = in_out_features(module)  # private in PEFT, read in 0.21.2
    else:
        in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (in_features, out_features) if isinstance(in_features, int) and isinstance(out_features, int) else None


def _first_without_keys(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """By list of blocks, the number of the first one that takes keys and values from an earlier one.

    `is_kv_shared_layer` stands on the attention of Gemma 3n and 4 and of those that follow them (read in transformers
    5.23). `generate` and `logits_to_keep` let Gemma 4 go on with the last tokens from there on.
    """
    first: dict[str, int] = {}
    for name, module in modules.items():
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if numbers and getattr(module, "is_kv_shared_layer", False) is True:
            blocks, number = ".".join(parts[: numbers[-1]]), int(parts[numbers[-1]])
            first[blocks] = min(number, first.get(blocks, number))
    return first


def _other_steps(modules: Mapping[str, nn.Module], before: str, after: str) -> str:
    """In what two convolutions with equal kernels differ."""
    first, second = (modules.get(name) for name in (before, after))
    first, second = (m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in (first, second))
    names = ("stride", "padding", "dilation", "groups", "padding_mode", "transposed")
    return ", ".join(name for name in names if getattr(first, name, None) != getattr(second, name, None))


def _tokens_stop(first_without_keys: Mapping[str, int], before: str, after: str) -> bool:
    return any(
        before.startswith(f"{blocks}.")
        and after.startswith(f"{blocks}.")
        and _number_in(before, blocks) < first <= _number_in(after, blocks)
        for blocks, first in first_without_keys.items()
    )


def _number_in(name: str, blocks: str) -> int:
    number = name[len(blocks) + 1 :].split(".", 1)[0]
    return int(number) if number.isdigit() else -1


def _side_by_side(modules: Mapping[str, nn.Module], before: str, after: str) -> bool:
    container = _parting(before, after)
    name = container.rpartition(".")[2]
    return bool(_SIDE_BY_SIDE.search(name)) and not isinstance(modules.get(container), nn.Sequential)


def _parting(before: str, after: str) -> str:
    """The innermost module that is above both."""
    pairs = zip(before.split("."), after.split("."), strict=False)
    common = []
    for part, other in pairs:
        if part != other:
            break
        common.append(part)
    return ".".join(common)


def refuse_moved_rows(model: nn.Module, table: ChainTable) -> None:
    """Refuse shortcuts that add rows of linked layers where row i of the two is not the same token.

    Raises:
        ValueError: for 'input' and 'middle' in attention that cuts its input into windows, other ones in each block.
    """
    if table.shortcut == "block":
        return
    modules = {bare_name(name, model).removeprefix(PREFIX): module for name, module in model.named_modules()}
    for chain in table.chains:
        for before, after in pairwise(target.name for target in chain):
            first, second = _windows(modules, before), _windows(modules, after)
            if first != second:
                raise ValueError(
                    f"shortcut={table.shortcut!r} adds row by row what layers {before!r} and {after!r} compute, but "
                    f"their rows are cut into windows, by {first or 'none'} and {second or 'none'}: the same row is "
                    "another place in each. Use shortcut='block', which adds no rows; leave the attention out with "
                    "exclude_modules; or link blocks of equal windows only, with chain_pattern."
                )


def _windows(modules: Mapping[str, nn.Module], name: str) -> dict[str, object]:
    """How the modules around an attention layer cut its input into windows (Swin, SAM, ViTDet and others)."""
    parts = name.split(".")
    found: dict[str, object] = {}
    for n in range(1, len(parts)):
        if "att" not in ".".join(parts[n - 1 : -1]).lower():
            break
        module = modules.get(".".join(parts[:n]))
        attributes = {attribute: getattr(module, attribute, None) for attribute in ("window_size", "shift_size")}
        found |= {attribute: value for attribute, value in attributes.items() if value is not None}
    return found
