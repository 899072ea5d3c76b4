"""Adapters of kongds/MoRA, by the description of their format and operators in its PEFT fork.

Read in github.com/kongds/MoRA, peft-mora/src/peft/tuners/lora/layer.py at d0528b4: `update_layer` for the sizes and
the scaling, which is 1 whatever `lora_alpha` is, and `_apply_mora` for the operators. Each layer has one matrix
`(q, q)` in the convention of `nn.Linear`, saved under the names `lora_A` and `lora_B`. The operator of a type is

    type   input to q numbers                                    q numbers to output
    1      as 'sharing': entry p of the groups is x[p mod in]    repeated, as 'sharing'
    2      sums over neighbors: the first `in mod q` runs are   each number `ceil(out / q)` times in a row, the last
           `ceil(in / q)` long, the others `floor(in / q)`       ones `floor(out / q)` times
    3      as type 2                                             as type 1
    4      as type 1                                             as type 2
    6      as 'rotation'                                         as 'rotation'

Where no run is longer than 1 (q at least as large as the side of the layer), types 2 to 4 are 'sharing' too; elsewhere
they mix neighbors, and none of our operators does. q is the rounded root of (in + out) r, of type 6 then rounded down
to an even number, where ours is rounded to the nearest one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_reslora.export.targets import linear_shape
from peft_reslora.imports.account import Account, Row, kept
from peft_reslora.imports.reading import Imported, base_with, integer, read_json, read_tensors, refuse_nonfinite
from peft_reslora.mora import MoRAConfig
from peft_reslora.mora.operators import MoRAType, square_size
from peft_reslora.shared import fields
from peft_reslora.shared.names import bare_name
from peft_reslora.shared.saving import CONFIG_FILE, WEIGHTS_FILE

_PREFIX = "base_model.model."
_BIN_FILE = "adapter_model.bin"
_PARTS = (".lora_A.weight", ".lora_B.weight")
_TYPES = (1, 2, 3, 4, 6)
_READS_RUNS, _REPEATS_RUNS = (2, 3), (2, 4)
_KEPT = (
    "r",
    "target_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "task_type",
    "auto_mapping",
    "revision",
)
_UNUSED = {
    "lora_alpha": "their forward multiplies by 1, whatever it is, and so does ours",
    "use_rslora": "as lora_alpha",
    "alpha_pattern": "as lora_alpha",
    "init_lora_weights": "their matrix starts at zero, whatever it is; ours has been trained",
    "fan_in_fan_out": "found on the layer itself; their merge_and_unload ignores it, which is wrong for Conv1D",
}


def is_mora(folder: Path) -> bool:
    """Whether it is the folder of an adapter with `use_mora`."""
    file = folder / CONFIG_FILE
    return file.is_file() and read_json(file).get("use_mora") is True


def read_mora(folder: Path, base: str | None) -> Imported:
    """The adapter as ours.

    Raises:
        ValueError: naming what has no equal here, or does not fit together.
    """
    file = folder / CONFIG_FILE
    theirs = read_json(file)
    mora_type, r = integer(theirs, "mora_type", 1, file), integer(theirs, "r", 8, file)
    _refuse(theirs, mora_type, folder)
    ours: MoRAType = "rotation" if mora_type == 6 else "sharing"
    config = MoRAConfig(
        mora_type=ours,
        mora_dropout=theirs.get("lora_dropout") or 0.0,
        base_model_name_or_path=base or theirs.get("base_model_name_or_path"),
        **{name: value for name in _KEPT if (value := theirs.get(name)) is not None},
    )
    matrices, others = _matrices(_read_file(folder), theirs.get("modules_to_save") or ())
    refuse_nonfinite({**matrices, **others})
    model = base_with(config, matrices)
    modules = dict(model.named_modules())
    rank_pattern, zeroed = {}, 0
    for name, M in matrices.items():
        if (shape := linear_shape(modules[name])) is None:
            raise ValueError(f"Layer {name!r} of the adapter is no linear layer of the base model {base!r}.")
        _refuse_other_size(name, M, shape, _rank_there(theirs, name, r, file), mora_type)
        rank_here = _rank_here(name, M.shape[0], shape, r, ours)
        if rank_here != r:
            rank_pattern[name] = rank_here
        if mora_type not in (1, 6):
            matrices[name] = _as_sharing(name, M, shape, mora_type)
            zeroed += matrices[name] is not M
    config.rank_pattern = rank_pattern
    rows = _rows(theirs, mora_type, ours, rank_pattern, len(others), zeroed)
    account = Account(
        f"MoRA of kongds/MoRA, mora_type={mora_type}", str(config.base_model_name_or_path), len(matrices), rows
    )
    tensors = {f"{_PREFIX}{name}.mora_M": M for name, M in matrices.items()} | others
    return Imported(config, tensors, model, account)


def _refuse(theirs: Mapping[str, Any], mora_type: int, folder: Path) -> None:
    """What is known to have no equal from the config and the folder."""
    if mora_type not in _TYPES:
        raise ValueError(
            f"mora_type={mora_type} computes nothing in kongds/MoRA: its forward knows the types "
            f"{', '.join(map(str, _TYPES))} and fails with others. If you know the type, correct {CONFIG_FILE}."
        )
    if (bias := theirs.get("bias", "none")) != "none":
        raise ValueError(f"bias={bias!r} trained biases of the base model, which are not imported; only 'none' is.")
    if theirs.get("use_dora"):
        raise ValueError("use_dora=true beside use_mora: their forward leaves out DoRA's magnitudes, which it saves.")
    if any((place / "base-model").is_dir() for place in (folder, folder.parent)):
        raise ValueError(
            f"There is a base-model folder at {folder}, so that it is from a ReMoRA run (--use_relora): each restart "
            "changed the weights of the base model, and went on with another mora_type than the config has, which "
            "nothing in the files tells. Merge the adapter with the program that trained it."
        )


def _read_file(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in (WEIGHTS_FILE, _BIN_FILE) if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds neither {WEIGHTS_FILE} nor {_BIN_FILE}, so there is no adapter in it.")
    return read_tensors([file])


def _matrices(
    tensors: Mapping[str, Tensor], modules_to_save: tuple[str, ...] | list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """M by layer, and the tensors of the modules that were trained whole, under their own keys.

    Raises:
        ValueError: if the two names of a matrix hold different ones, or for tensors that are of neither kind.
    """
    matrices: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        bare = bare_name(key)
        part = next((part for part in _PARTS if bare.endswith(part)), None)
        name = bare.removeprefix(_PREFIX).removesuffix(part or "")
        if part is None and set(name.split(".")[:-1]) & set(modules_to_save):
            others[bare] = tensor
        elif part is None:
            raise ValueError(f"The tensor {key} is neither a matrix of MoRA nor part of one of its modules_to_save.")
        elif name in matrices and not matrices[name].equal(tensor):
            raise ValueError(
                f"Layer {name!r} holds other numbers as lora_A than as lora_B, which are one matrix in kongds/MoRA: "
                "which of them was trained cannot be known. Another program has changed the file."
            )
        else:
            matrices[name] = tensor
    if not matrices:
        raise ValueError("The file holds no matrices of MoRA, so there is no adapter in it.")
    return matrices, others


def _rank_there(theirs: Mapping[str, Any], name: str, r: int, file: Path) -> int:
    """The rank of a layer, as their tuner looks it up: the first pattern that a whole end of the name matches."""
    pattern = theirs.get("rank_pattern") or {}
    if (fault := fields.by_pattern(pattern)) or any(fields.rank(value) for value in pattern.values()):
        raise ValueError(f"{file} has rank_pattern={pattern!r}: {fault or 'its ranks have to be positive integers'}.")
    escaped = (key for key in pattern if name == key or name.endswith(f".{key}"))
    if (key := next(escaped, None)) is not None:
        return pattern[key]
    if any(re.escape(key) != key.replace(".", r"\.") for key in pattern):
        raise ValueError(f"{file} has rank_pattern={pattern!r} with regular expressions; write out the layers' names.")
    return r


def _size_there(shape: tuple[int, int], r: int, mora_type: int) -> int:
    q = int(math.sqrt(sum(shape) * r) + 0.5)
    return q // 2 * 2 if mora_type == 6 else q


def _refuse_other_size(name: str, M: Tensor, shape: tuple[int, int], r: int, mora_type: int) -> None:
    if tuple(M.shape) != (q := _size_there(shape, r, mora_type), q):
        raise ValueError(
            f"Layer {name!r} has a matrix of {tuple(M.shape)}, and mora_type={mora_type} makes it {(q, q)} with "
            f"r={r}, {shape[0]} inputs and {shape[1]} outputs: adapter, config and base model do not belong together. "
            "Pass base= (--base) with the base model on which it was trained."
        )


def _rank_here(name: str, q: int, shape: tuple[int, int], r: int, mora_type: MoRAType) -> int:
    """A rank for which our square has the side q: theirs, or else the nearest."""
    near = round(q * q / sum(shape))
    ranks = [r, *sorted({max(1, near - 1), max(1, near), near + 1}, key=lambda other: abs(other - r))]
    found = next((rank for rank in ranks if square_size(*shape, rank, mora_type) == q), None)
    if found is None:
        raise ValueError(
            f"Layer {name!r} with {shape[0]} inputs and {shape[1]} outputs has a square of {q} in kongds/MoRA, which "
            f"rounds down to an even number; ours is {square_size(*shape, r, mora_type)} for r={r} (the nearest even "
            f"number), and {q} for no rank. Merge the adapter with kongds/MoRA's own merge_and_unload."
        )
    return found


def _as_sharing(name: str, M: Tensor, shape: tuple[int, int], mora_type: int) -> Tensor:
    """The matrix with which 'sharing' computes what types 2 to 4 do.

    Raises:
        ValueError: if there is none, since a run is longer than 1.
    """
    q, (in_features, out_features) = M.shape[0], shape
    reads = mora_type in _READS_RUNS and in_features > q
    repeats = mora_type in _REPEATS_RUNS and out_features > q
    if reads or repeats:
        does = " and ".join(
            text
            for there, text in (
                (reads, f"sums up neighbouring ones of {in_features} inputs"),
                (repeats, f"repeats each result for neighbouring ones of {out_features} outputs"),
            )
            if there
        )
        raise ValueError(
            f"mora_type={mora_type} has no equal here: on layer {name!r} it {does}, with a square of {q}, and none of "
            "our operators mixes neighbors ('sharing', their type 1, mixes every q-th). Merge the adapter with "
            "kongds/MoRA's own merge_and_unload, or train with type 1 or 6."
        )
    if mora_type in _READS_RUNS and in_features < q:  # theirs reads zeros there, ours the inputs from the start again
        M = M.clone()
        M[:, in_features:] = 0
    return M


def _rows(
    theirs: dict[str, Any], mora_type: int, ours: str, rank_pattern: Mapping[str, int], others: int, zeroed: int
) -> tuple[Row, ...]:
    rows = [Row(f"mora_type={mora_type}", "converted", f"mora_type={ours!r}, the same operator")]
    rows += kept(theirs, *_KEPT)
    if theirs.get("lora_dropout"):
        rows.append(Row(f"lora_dropout={theirs['lora_dropout']}", "kept", "mora_dropout"))
    if rank_pattern:
        ranks = ", ".join(sorted({str(rank) for rank in rank_pattern.values()}))
        rows.append(Row("sides of the squares", "converted", f"rank_pattern, r={ranks} on {len(rank_pattern)} layers"))
    rows += [
        Row(f"{name}={theirs[name]!r}", "dropped", why)
        for name, why in _UNUSED.items()
        if theirs.get(name) not in (None, {}, False)
    ]
    rows.append(Row("lora_A, lora_B", "converted", "mora_M: they are one matrix under two names"))
    if zeroed:
        rows.append(
            Row("columns that no input reaches", "dropped", f"zero on {zeroed} layers, where ours wraps round")
        )
    if others:
        rows.append(Row(f"{others} tensors of modules_to_save", "kept", "as they are"))
    return tuple(rows)
