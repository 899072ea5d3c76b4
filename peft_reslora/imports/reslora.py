"""Adapters of LMOps' ResLoRA, by the description of their format and forward in its files.

Read in github.com/microsoft/LMOps, reslora/myloralib/{config,layers,reslora}.py at c7b5576 and bf95608. A layer holds
`lora_num` pairs `loras.<i>.lora_A` `(rank, in_features)` and `.lora_B` `(out_features, rank)`, of which those up to
`start_index` take part, each with the scaling lora_alpha / rank. `res_flag` 1, 2, 3 are the shortcuts input (Eq. 2),
block (Eq. 3) and middle (Eq. 4), with `pre_num` earlier layers (999 where -1 was given). Layers of one kind, whose
names hold the same word, are linked in the order of the model; one that has another shape than the one before it
begins a new chain.

`merge_flag` 3 and 4 make the evaluation compute a merged model. Their README calls 3 merge_bi and 4 merge_bw, and the
code does the reverse: for input, 3 takes norms of weights and 4 those of inputs; for middle, both take norms of
inputs or projections. For input, 3 also adds a product of the factors to the frozen base weight each time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_reslora.export.targets import linear_shape, target_names
from peft_reslora.imports.account import Account, Row
from peft_reslora.imports.reading import Imported, base_with, integer, read_json, read_tensors, refuse_nonfinite
from peft_reslora.reslora.chain_table import Target, chain_settings, find_chains, shortest_cuts
from peft_reslora.reslora.config import MergeEstimator, ResLoRAConfig, Shortcut
from peft_reslora.reslora.merging.estimators import UNRECORDED
from peft_reslora.shared.names import bare_name

_PREFIX = "base_model.model."
_CONFIG_FILE, _WEIGHTS_FILE = "reslora_config.json", "pytorch_model_lora.bin"
_WHOLE_CONFIG_FILE, _WHOLE_WEIGHTS = "config.json", ("model*.safetensors", "pytorch_model*.bin")
_KEY = re.compile(r"(.+)\.loras\.(\d+)\.(lora_A|lora_B)")
_SHORTCUTS: dict[int, Shortcut] = {1: "input", 2: "block", 3: "middle"}
_ALL = 999  # what their pre_num=-1 becomes
# The words in the names of the layers by which LMOps' program tells kinds apart, by family of models.
_KINDS = (
    ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("query", "key", "value", "out"),
)


@dataclass(frozen=True)
class _Settings:
    """What their config says, checked."""

    rank: int
    alpha: int
    dropout: float
    active: int  # how many pairs of each layer take part
    shortcut: Shortcut
    pre_num: int
    merge_flag: int
    window: int


def is_reslora(folder: Path) -> bool:
    """Whether the folder holds a ResLoRA adapter of LMOps', or a whole model with one."""
    return (folder / _CONFIG_FILE).is_file() or _is_whole_model(folder)


def read_reslora(folder: Path, base: str | None) -> Imported:
    """The adapter as ours.

    Raises:
        ValueError: naming what has no equal here, or does not fit together.
    """
    whole = not (folder / _CONFIG_FILE).is_file()
    file = folder / (_WHOLE_CONFIG_FILE if whole else _CONFIG_FILE)
    theirs = read_json(file)["resconfig"] if whole else read_json(file)
    settings = _settings(theirs, file)
    base = base or (str(folder) if whole else None)
    _refuse_changed_base(settings, base, folder)
    pairs, rest, copies = _pairs(_tensors(folder, whole), settings, whole)
    refuse_nonfinite(
        {f"{name}, {part}": M for name, pair in pairs.items() for part, M in zip("AB", pair, strict=True)}
    )
    r = settings.rank * settings.active
    config = ResLoRAConfig(
        r=r,
        lora_alpha=settings.alpha * settings.active,
        lora_dropout=settings.dropout,
        shortcut=settings.shortcut,
        pre_num=settings.pre_num,
        merge_estimator=_estimator(settings),
        norm_window=settings.window,
        base_model_name_or_path=base,
    )
    model = base_with(config, pairs)
    modules = dict(model.named_modules())
    _refuse_misfits(pairs, modules)
    ordered = [name for name in modules if name in pairs]
    config.target_modules = target_names(ordered, modules)
    config.chain_cuts = _cuts(config, [Target(name, *_shape(pairs[name]), rank=r) for name in ordered])
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": A, f"{_PREFIX}{name}.lora_B.weight": B}
        if settings.shortcut != "block":
            tensors[f"{_PREFIX}{name}.lora_norm"] = torch.full((settings.window,), UNRECORDED)
    rows = (*_config_rows(theirs, settings), *_tensor_rows(settings, rest, copies))
    account = Account(f"ResLoRA of LMOps, res_flag={theirs['res_flag']}", str(base), len(pairs), rows)
    return Imported(config, tensors, model, account)


def _is_whole_model(folder: Path) -> bool:
    file = folder / _WHOLE_CONFIG_FILE
    return file.is_file() and isinstance(read_json(file).get("resconfig"), dict)


def _settings(theirs: dict[str, Any], file: Path) -> _Settings:
    """Their config, as far as it decides what is computed.

    Raises:
        ValueError: for values that no run of their program has, and for adapters without shortcuts.
    """
    rank, alpha = integer(theirs, "rank", 16, file), integer(theirs, "lora_alpha", 32, file)
    flag, merge_flag = integer(theirs, "res_flag", 0, file), integer(theirs, "merge_flag", 0, file)
    pre_num, window = integer(theirs, "pre_num", 0, file), integer(theirs, "merge_4_len", 100, file)
    start, pairs = integer(theirs, "start_index", -100, file), integer(theirs, "lora_num", 1, file)
    dropout = theirs.get("lora_dropout", 0.05)
    if flag == 0 or (flag in (2, 3) and pre_num == 0):
        raise ValueError(
            f"res_flag={flag} with pre_num={pre_num} is LoRA without any shortcut, which needs no ResLoRA: write its "
            "pairs as a LoRA of PEFT."
        )
    faults = [
        (flag in _SHORTCUTS, f"res_flag={flag}, which is none of 1, 2 and 3"),
        (merge_flag in (0, 3, 4), f"merge_flag={merge_flag}, which is none of 0, 3 and 4"),
        (rank >= 1 and window >= 1, f"rank={rank} and merge_4_len={window}, which have to be positive"),
        (pre_num >= -1, f"pre_num={pre_num}, which is below -1"),
        (
            0 <= start < pairs,
            f"start_index={start} with lora_num={pairs}, so that no pair, or one too many, took part",
        ),
        (isinstance(dropout, (int, float)) and 0 <= dropout < 1, f"lora_dropout={dropout!r}, which is not in [0, 1)"),
    ]
    if wrong := [text for right, text in faults if not right]:
        raise ValueError(f"{file} has {'; '.join(wrong)}.")
    reach = 1 if flag == 1 else -1 if pre_num in (-1, _ALL) else pre_num
    return _Settings(rank, alpha, dropout, start + 1, _SHORTCUTS[flag], reach, merge_flag, window)


def _refuse_changed_base(settings: _Settings, base: str | None, folder: Path) -> None:
    """Their evaluation has changed the base weights: only those in the same folder fit the adapter."""
    if settings.shortcut == "input" and settings.merge_flag == 3 and (base is None or Path(base) != folder):
        where = "only this folder holds: leave out base=" if _is_whole_model(folder) else "the folder does not hold"
        raise ValueError(
            "res_flag=1 with merge_flag=3: LMOps' calculate_froc adds the factors' product to the frozen base weights "
            "before each evaluation, and training goes on with these, so that the adapter belongs to weights which "
            f"{where}. If the run never evaluated, set merge_flag to 0 in the config and import again."
        )


def _tensors(folder: Path, whole: bool) -> dict[str, Tensor]:
    files = [folder / _WEIGHTS_FILE] if not whole else _weights_of_model(folder)
    if not files or not files[0].is_file():
        raise ValueError(f"{folder} does not hold {_WEIGHTS_FILE if not whole else ' or '.join(_WHOLE_WEIGHTS)}.")
    return read_tensors(files)


def _weights_of_model(folder: Path) -> list[Path]:
    """All shards, of one kind."""
    return next((found for pattern in _WHOLE_WEIGHTS if (found := sorted(folder.glob(pattern)))), [])


def _pairs(
    tensors: Mapping[str, Tensor], settings: _Settings, whole: bool
) -> tuple[dict[str, tuple[Tensor, Tensor]], int, int]:
    """(A, B) of each layer, its pairs side by side; how many other tensors there are, and how many copies.

    Raises:
        ValueError: if pairs are missing, or there are some that no run of their program has left.
    """
    found: dict[str, dict[tuple[int, str], Tensor]] = {}
    rest = copies = 0
    for key, tensor in tensors.items():
        if "pre_lora" in key.split("."):  # where the layers were saved while they hung on each other
            copies += 1
        elif (match := _KEY.fullmatch(key)) is None:
            rest += 1
        else:
            found.setdefault(bare_name(match[1]), {})[int(match[2]), match[3]] = tensor
    if not found:
        raise ValueError("The file holds no pairs such as 'layers.0.q_proj.loras.0.lora_A', so no adapter is in it.")
    if rest and not whole:
        raise ValueError(f"{_WEIGHTS_FILE} holds {rest} tensors that are no pairs of ResLoRA's; it is something else.")
    pairs = {}
    for name, parts in found.items():
        wanted = [(i, part) for i in range(settings.active) for part in ("lora_A", "lora_B")]
        if missing := [key for key in wanted if key not in parts]:
            raise ValueError(
                f"Layer {name!r} has no loras.{missing[0][0]}.{missing[0][1]}, and start_index={settings.active - 1} "
                f"says that {settings.active} pairs took part. LMOps' save_lora_checkpoint writes one pair, with the "
                "A and the B of all pairs added up apart, which is not the sum of their products; save_checkpoint "
                "writes all of them."
            )
        A, B = ([parts[i, part] for i in range(settings.active)] for part in ("lora_A", "lora_B"))
        shapes = [tuple(factor.shape) for factor in (*A, *B)]
        if shapes != [*[(settings.rank, shapes[0][-1])] * len(A), *[(shapes[-1][0], settings.rank)] * len(B)]:
            raise ValueError(
                f"The pairs of layer {name!r} have the shapes {', '.join(map(str, shapes))}, and rank={settings.rank} "
                "in the config makes them (rank, in_features) and (out_features, rank): config and tensors do not "
                "belong together."
            )
        pairs[name] = torch.cat(A), torch.cat(B, dim=1)
    return pairs, rest, copies


def _shape(pair: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return pair[0].shape[1], pair[1].shape[0]


def _refuse_misfits(pairs: Mapping[str, tuple[Tensor, Tensor]], modules: Mapping[str, nn.Module]) -> None:
    for name, pair in pairs.items():
        if (shape := linear_shape(modules[name])) != _shape(pair):
            raise ValueError(
                f"The pairs of layer {name!r} are for {_shape(pair)} inputs and outputs, and the base model has "
                f"{shape or 'no linear layer'} there: they do not belong together. Pass base= (--base) with the base "
                "model on which the adapter was trained."
            )


def _estimator(settings: _Settings) -> MergeEstimator:
    """What stands nearest to their `merge_flag`, by what its code does."""
    return "weight_norm" if settings.merge_flag == 3 else "input_norm"


def _cuts(config: ResLoRAConfig, targets: list[Target]) -> list[str]:
    """The cuts with which our chains are theirs.

    Raises:
        ValueError: if a chain of theirs is none of ours whatever the cuts are.
    """
    chains = _chains(targets)
    cuts = {chain[0].name: "a chain begins here in LMOps' program" for chain in chains}
    config.chain_cuts = list(cuts)
    table = find_chains(targets, *chain_settings(config), cuts)
    made = {tuple(target.name for target in chain) for chain in table.chains}
    theirs = [tuple(target.name for target in chain) for chain in chains]
    if unlike := [chain for chain in theirs if chain not in made]:
        links = {pair for chain in made for pair in pairwise(chain)}
        before, after = next((pair for pair in pairwise(unlike[0]) if pair not in links), unlike[0][:2])
        raise ValueError(
            f"LMOps' program links {before!r} to {after!r}, which follows it in the model, has its shape, and a name "
            "with the same word in it. Here chains are of one role, the same path but for the blocks' numbers, and "
            "these two have different ones; so the adapter cannot compute what it was trained for."
        )
    return shortest_cuts({link.after for link in table.missing if link.after in cuts}, table)


def _chains(targets: Iterable[Target]) -> list[list[Target]]:
    """Their chains: by the word in the layers' names, cut wherever the shape changes."""
    by_kind: dict[str, list[list[Target]]] = {}
    targets = list(targets)
    kinds = _kinds([target.name for target in targets])
    for target in targets:
        chains = by_kind.setdefault(kinds[target.name], [])
        if chains and chains[-1][-1].shape == target.shape:
            chains[-1].append(target)
        else:
            chains.append([target])
    return [chain for chains in by_kind.values() for chain in chains]


def _kinds(names: Iterable[str]) -> dict[str, str]:
    """The word in the name of each layer by which their program tells its kind.

    Raises:
        ValueError: if their tables have none for one of them, so that the program was changed.
    """
    for words in _KINDS:
        found = {name: [word for word in words if word in name.lower()] for name in names}
        if all(len(matching) == 1 for matching in found.values()):
            return {name: matching[0] for name, matching in found.items()}
    raise ValueError(
        f"The layers ({', '.join(list(names)[:3])}, ...) are of none of the families in LMOps' TARGET_MODULES_DICT "
        f"({'; '.join(', '.join(words) for words in _KINDS)}), and which of them a changed program has linked is not "
        "known."
    )


def _config_rows(theirs: Mapping[str, Any], settings: _Settings) -> list[Row]:
    k = settings.active
    several = f", {k} pairs of each layer side by side: r={settings.rank * k}, lora_alpha={settings.alpha * k}"
    rows = [
        Row(f"res_flag={theirs['res_flag']}", "converted", f"shortcut={settings.shortcut!r}, the same equation"),
        Row(
            f"rank={settings.rank}, lora_alpha={settings.alpha}",
            "converted" if k > 1 else "kept",
            f"r, lora_alpha{several if k > 1 else ''}",
        ),
        Row(
            f"lora_dropout={settings.dropout}",
            "kept",
            "lora_dropout"
            + (", one mask for all terms of a layer instead of one each" if settings.shortcut == "block" else ""),
        ),
    ]
    given = theirs.get("pre_num", 0)
    if settings.shortcut == "input":
        rows.append(Row(f"pre_num={given}", "dropped", "with res_flag=1 their forward takes one earlier layer"))
    else:
        rows.append(
            Row(
                f"pre_num={given}", "kept" if given == settings.pre_num else "converted", f"pre_num={settings.pre_num}"
            )
        )
    rows.append(Row(f"target_modules={theirs.get('target_modules')!r}", "converted", "the layers that the file holds"))
    rows.append(Row("links by a word in the names", "converted", "the same chains, chain_cuts in the config"))
    rows.append(_merge_row(settings))
    if settings.shortcut != "block":
        rows.append(Row(f"merge_4_len={settings.window}", "kept", f"norm_window={settings.window}"))
    return [*rows, Row("merge_weights", "dropped", "nothing reads it")]


def _merge_row(settings: _Settings) -> Row:
    found, here = f"merge_flag={settings.merge_flag}", f"merge_estimator={_estimator(settings)!r}"
    if settings.shortcut == "block":
        return Row(found, "dropped", "the merge of 'block' is exact and needs no estimate")
    if settings.merge_flag == 0:
        return Row(found, "dropped", f"they do not merge; {here}, the default, once norms are recorded")
    differs = {
        ("input", 3): "; theirs takes norms of W + (B A)^T without the scaling",
        ("input", 4): "; theirs takes norms of whole batches, whose size counts",
        ("middle", 3): "; theirs takes norms of inputs in the place of weights'",
        ("middle", 4): "; theirs takes norms of whole batches, whose size counts",
    }[settings.shortcut, settings.merge_flag]
    return Row(found, "converted", here + differs + ". They evaluated the merged model")


def _tensor_rows(settings: _Settings, rest: int, copies: int) -> list[Row]:
    rows = []
    if settings.shortcut != "block":
        why = "not in their files: record them anew by training forwards, or call calibrate_merge"
        rows.append(Row("norms of inputs", "dropped", why))
    if rest:
        rows.append(
            Row(
                f"{rest} other tensors",
                "dropped",
                "the base model's, which stay where they are: base_model_name_or_path",
            )
        )
    if copies:
        rows.append(Row(f"{copies} tensors of pre_lora", "dropped", "copies of those of earlier layers"))
    return rows
