"""`MoRAConfig`: what the user chooses about MoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig, PeftType

from peft_reslora.shared import fields
from peft_reslora.shared.names import PREFIX, role_of
from peft_reslora.shared.patterns import by_pattern
from peft_reslora.shared.saving import SavedWhole

from .operators import MoRAType

Bias = Literal["none", "all", "mora_only"]

AUTO_SHARING_FROM_RANK = 32
"""The rank from which `mora_type="auto"` takes sharing; below it, rotation.

The authors advise rotation at rank 8 and sharing at 128 and 256, and leave open what lies between; this is the
geometric middle. It agrees with `benchmarks/uuid_pairs.py`: at rank 8 rotation memorizes 97.9 % and sharing 73.2 %, at
rank 32 both are level; there sharing's step is the cheaper one, since rotation multiplies each group with M and
sharing their sum (1.2 against 1.0 of LoRA's step at rank 64 and hidden size 1024).
"""


_CHECKS: dict[str, fields.Check] = {
    "r": fields.rank,
    "task_type": fields.task_type,
    "mora_dropout": fields.dropout,
    "target_modules": fields.names_or_pattern,
    "exclude_modules": fields.names_or_pattern,
    "layers_pattern": fields.names_or_pattern,
    "layers_to_transform": fields.indices,
    "modules_to_save": fields.names,
    "base_model_name_or_path": fields.text,
    "revision": fields.text,
    "inference_mode": fields.flag,
    "stamped": fields.flag,
    "ensure_weight_tying": fields.flag,
}


def computation(mora_type: MoRAType) -> str:
    """What besides its matrix decides what a layer computes, in the words of its stamp."""
    return f"mora_type={mora_type!r}"


@dataclass
class MoRAConfig(SavedWhole, PeftConfig):
    """One square matrix M per target layer, instead of LoRA's two factors.

    MoRA, arXiv 2405.12130. The layer computes base(x) + decompress(M compress(x)); there is no alpha. Each field is
    described in its `help`.

    Raises:
        ValueError: listing every fault at once - an `r` (also in `rank_pattern`) that is not a positive integer, an
            unknown `mora_type` or `bias`, a `mora_dropout` outside [0, 1), an `init_weights` that is no bool, or layer
            selections that exclude each other.
    """

    r: int = field(
        default=8,
        metadata={
            "help": "The LoRA rank whose parameter count is matched: M has about r * (in_features + out_features) "
            "entries, so its side is the rounded root of that."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the layers to adapt: a list of name endings, a regular expression for the whole name, "
            "or 'all-linear'. None takes PEFT's choice for LoRA on this architecture."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of layers to leave out, as a list of name endings or a regular expression."},
    )
    mora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update, in [0, 1)."})
    mora_type: Literal["auto", "sharing", "decoupling", "rotation"] = field(
        default="auto",
        metadata={
            "help": "How the input meets M. 'sharing' sums its groups (Eq. 6), 'decoupling' multiplies each group "
            "with M, 'rotation' does so after rotating group g by g positions (Eq. 9). 'auto' takes rotation for "
            "small ranks and sharing for large ones."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True: M is zero at the start, which leaves the base model as it is. False: random, for tests."
        },
    )
    bias: Bias = field(
        default="none",
        metadata={"help": "Biases to train and save: 'none', 'all', or 'mora_only' (those of the adapted layers)."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers to train and save whole, e.g. a freshly initialized classifier."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the blocks to adapt; only where `target_modules` is a list."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the list of blocks that `layers_to_transform` counts in, if it is an unusual one."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Ranks other than `r`: layer name, name ending or regular expression to rank."},
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={"help": "Keep copies in `modules_to_save` tied where the base model ties the weights, as in LoRA."},
    )

    stamped: bool = field(
        default=False,
        metadata={
            "help": "Whether the saved tensors of each layer come with a stamp, by which damage and the config of "
            "another adapter are noticed; those of 0.1.0 do not. Set by saving, not by you."
        },
    )

    def __post_init__(self) -> None:
        faults = fields.field_faults(self, _CHECKS, {"rank_pattern": fields.rank})
        fields.refuse(self, [*faults, *self._faults()])
        fields.refuse(self, fields.pattern_faults(self))
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        self.peft_type = PeftType.MORA  # type: ignore[attr-defined]
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.ensure_weight_tying:  # as `LoraConfig` does; PEFT fills them in
            self.modules_to_tie = None
            self.target_modules_to_tie = None

    def _faults(self) -> list[str]:
        faults = []
        for name, known in (("mora_type", ("auto", *get_args(MoRAType))), ("bias", get_args(Bias))):
            if (value := getattr(self, name)) not in known:
                known_ones = ", ".join(map(repr, known))
                faults.append(f"{name}={fields.shown(value)} is unknown, choose one of {known_ones}")
        if not isinstance(self.init_weights, bool):
            faults.append(
                f"init_weights={fields.shown(self.init_weights)} must be True (zeros) or False (random, for tests)"
            )
        if isinstance(self.target_modules, str):
            faults += [
                f"{name} cannot be used when target_modules is a regular expression, write the indices into it"
                for name in ("layers_to_transform", "layers_pattern")
                if getattr(self, name) is not None
            ]
        elif self.layers_pattern and self.layers_to_transform is None:
            faults.append("layers_pattern says where layers_to_transform counts, so set layers_to_transform too")
        return faults

    def resolve_type(self, r: int) -> MoRAType:
        """The operator for a layer of rank `r`, with "auto" decided."""
        if self.mora_type == "auto":
            return "rotation" if r < AUTO_SHARING_FROM_RANK else "sharing"
        return self.mora_type

    def size_table(self, sides: Mapping[str, int]) -> list[tuple[str, ...]]:
        """A header and a row for each kind of layer of a saved adapter: its operator and size."""
        suffix = ".mora_M"
        names = {key: key.removesuffix(suffix).removeprefix(PREFIX) for key in sides if key.endswith(suffix)}
        fields.refuse_slow_patterns(self, names.values())
        rows: Counter[tuple[str, ...]] = Counter()
        for key, name in names.items():
            q = sides[key]
            r = by_pattern(self.rank_pattern, name, self.r)
            rows[role_of(name), self.resolve_type(r), str(r), str(q), str(q * q)] += 1
        header = ("role", "type", "r", "q", "parameters (LoRA of rank r: about as many)", "layers")
        return [header, *((*row, str(count)) for row, count in rows.items())]
