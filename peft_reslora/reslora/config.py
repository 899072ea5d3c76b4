"""`ResLoRAConfig`: LoRA's fields and the shortcut's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import LoraConfig, PeftType

from peft_reslora.shared import fields
from peft_reslora.shared.patterns import scaling_of
from peft_reslora.shared.saving import SavedWhole

Shortcut = Literal["input", "block", "middle"]
MergeEstimator = Literal["input_norm", "weight_norm", "least_squares", "drop"]

AUTO, BY_NUMBER = "auto", "by_number"  # values of `chain_cuts` besides a list

# LoRA's fields that change what a block computes, with the values under which they do not.
_REFUSED_FIELDS: dict[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "arrow_config": (None,),
    "use_bdlora": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "lora_bias": (False,),
    "megatron_config": (None,),
}
_INITS: tuple[object, ...] = (True, False, "gaussian", "orthogonal")
_CHECKS: dict[str, fields.Check] = {
    "r": fields.rank,
    "task_type": fields.task_type,
    "norm_window": fields.norm_window,
    "lora_alpha": fields.alpha,
    "lora_dropout": fields.dropout,
    "target_modules": fields.names_or_pattern,
    "target_parameters": fields.names,
    "exclude_modules": fields.names_or_pattern,
    "chain_pattern": fields.names_or_pattern,
    "layers_pattern": fields.names_or_pattern,
    "layers_to_transform": fields.indices,
    "layer_replication": fields.replication,
    "modules_to_save": fields.names,
    "trainable_token_indices": fields.token_indices,
    "bias": fields.one_of("none", "all", "lora_only"),
    "estimate": lambda value: None if value is None else fields.one_of("calibrated", "annealed")(value),
    "total_step": lambda value: None if value is None else fields.interval(value),
    "deltaT": fields.interval,
    "orth_reg_weight": fields.penalty,
    **dict.fromkeys(("target_r", "init_r"), fields.rank),
    **dict.fromkeys(("tinit", "tfinal"), fields.steps),
    **dict.fromkeys(("beta1", "beta2"), fields.decay),
    "base_model_name_or_path": fields.text,
    "revision": fields.text,
    **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "nested_ranks"), fields.flag),
    **dict.fromkeys(("inference_mode", "ensure_weight_tying", "stamped"), fields.flag),
}


# AdaLoRA's fields besides the one that chooses it.
_ADALORA_FIELDS = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


@dataclass
class ResLoRAConfig(SavedWhole, LoraConfig):
    """LoRA with residual shortcuts between the blocks of consecutive layers.

    ResLoRA, arXiv 2402.18039. All fields of `LoraConfig` keep their meaning; the added ones are described by the
    `help` in their metadata.

    Raises:
        ValueError: listing every fault at once - an unknown `shortcut` or `merge_estimator`, a `pre_num` that is 0,
            below -1 or (for `input`) other than 1, a `norm_window` below 1, `r` below 1, or a LoRA field that changes
            what a block computes.
    """

    shortcut: Shortcut = field(
        default="block",
        metadata={
            "help": "What earlier layers hand to this one: 'input' their input x (Eq. 2), 'block' their whole update "
            "B A (Eq. 3), 'middle' their projection A x (Eq. 4)."
        },
    )
    pre_num: int = field(
        default=1,
        metadata={"help": "How many earlier layers take part, the paper's m; -1 means all. 'input' accepts 1 only."},
    )
    merge_estimator: MergeEstimator = field(
        default="input_norm",
        metadata={
            "help": "How 'input' and 'middle' become one matrix when merged; read at merge time. 'block' is exact and "
            "needs none. 'input_norm' and 'weight_norm' are the paper's merge_bi and merge_bw, 'least_squares' needs "
            "calibrate_merge(model, batches), which chooses it, 'drop' leaves the shortcut out."
        },
    )
    norm_window: int = field(
        default=100,
        metadata={"help": "Training forwards over which 'input_norm' averages the root mean square of its input."},
    )
    chain_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Regular expressions searched in the module names, in which the groups capture the block indices: "
            "layers whose names agree outside the groups form one chain, in the order of the captured numbers. For "
            "models whose blocks are not numbered as in 'layers.3.'; layers that match none are grouped as usual."
        },
    )
    chain_cuts: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Where new chains begin, other than at a new shape: names of layers, or of modules above them. "
            "'auto', as a new config has it, finds them on the model at injection: where a layer between two others "
            "is not targeted, where layers stand side by side, where keys and values are shared. The config then "
            "holds them, so that the adapter keeps its chains. 'by_number' ends chains wherever block numbers are "
            "not consecutive, as for adapters that version 0.1.0 saved."
        },
    )

    nested_ranks: bool = field(
        default=False,
        metadata={
            "help": "Chooses DyLoRA (arXiv 2210.07558): the first b directions of each layer are trained to be an "
            "adapter of rank b, for each b up to r, with the scaling of a LoRA of rank b. Train with the callback "
            "NestedRanks; export_lora(model, rank=b) then takes the first b directions, without a fit."
        },
    )
    total_step: int | None = field(
        default=None,
        metadata={
            "help": "Chooses AdaLoRA (arXiv 2303.10512), and says how many optimizer steps the training takes. Each "
            "block is B diag(E) A then, and the ranks of the layers are allocated while they train: use "
            "RankAllocationCallback, or call model.update_and_allocate(step) after each optimizer step. The fields "
            "that follow are AdaLoRA's, with the meaning and defaults of AdaLoraConfig; rank_pattern holds the ranks "
            "once they are allocated. None for a LoRA."
        },
    )
    target_r: int = field(default=8, metadata={"help": "AdaLoRA: the mean rank of the layers at the end."})
    init_r: int = field(
        default=12,
        metadata={"help": "AdaLoRA: each layer's rank at the start, in place of r; s is alpha / (init_r + 1e-5)."},
    )
    tinit: int = field(default=0, metadata={"help": "AdaLoRA: steps before the budget of ranks begins to shrink."})
    tfinal: int = field(default=0, metadata={"help": "AdaLoRA: steps at the end, with the ranks as they are then."})
    deltaT: int = field(default=1, metadata={"help": "AdaLoRA: steps from one allocation to the next."})
    beta1: float = field(default=0.85, metadata={"help": "AdaLoRA: decay of the mean of the sensitivities."})
    beta2: float = field(default=0.85, metadata={"help": "AdaLoRA: decay of the mean of their uncertainties."})
    orth_reg_weight: float = field(
        default=0.5,
        metadata={"help": "AdaLoRA: weight of the mean of ||A A^T - I|| and ||B^T B - I|| in the loss of the model."},
    )

    estimate: Literal["calibrated", "annealed"] | None = field(
        default=None,
        metadata={
            "help": "Which estimate of the shortcuts the adapter's layers hold, so that a layer has the place for it "
            "before it is loaded: 'calibrated' by calibrate_merge, 'annealed' by annealing. Set by these, not by you."
        },
    )
    stamped: bool = field(
        default=False,
        metadata={
            "help": "Whether the saved tensors of each layer come with a stamp, by which damage and the config of "
            "another adapter are noticed; those of 0.1.0 do not. Set by saving, not by you."
        },
    )

    def __post_init__(self) -> None:
        if self.chain_cuts is None:
            # A file of version 0.1.0 has no such field, but its type and PEFT's version, which a new config has not.
            saved = self.peft_version is not None and self.peft_type == PeftType["RESLORA"]
            self.chain_cuts = BY_NUMBER if saved else AUTO
        faults = fields.field_faults(self, _CHECKS, {"rank_pattern": fields.rank, "alpha_pattern": fields.alpha})
        # PEFT takes the kinds for granted
        faults += [*self._own_faults(), *self._lora_faults(), *self._parameter_faults(), *self._adalora_faults(faults)]
        fields.refuse(self, faults)
        fields.refuse(self, fields.pattern_faults(self))
        if self.total_step is not None:
            self.r = self.init_r
        super().__post_init__()
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        self.peft_type = PeftType["RESLORA"]

    def scaling(self, r: int, alpha: float) -> float:
        """s of a layer with rank r: LoRA's, or AdaLoRA's, which pruning leaves as it is."""
        return scaling_of(self, r, alpha) if self.total_step is None else alpha / (self.init_r + 1e-5)

    def computation(self, r: int, alpha: float, position: int) -> str:
        """What besides its tensors decides what a layer computes, in the words of its stamp; `position` from 0."""
        return (
            f"shortcut={self.shortcut!r}, pre_num={self.pre_num}, scaling={self.scaling(r, alpha)}, layer "
            f"{position + 1} of its chain{', use_dora' if self.use_dora else ''}"
        )

    def _own_faults(self) -> list[str]:
        faults = []
        for name, known in (("shortcut", get_args(Shortcut)), ("merge_estimator", get_args(MergeEstimator))):
            if (value := getattr(self, name)) not in known:
                known_ones = ", ".join(map(repr, known))
                faults.append(f"{name}={fields.shown(value)} is unknown, choose one of {known_ones}")
        if (
            not isinstance(self.pre_num, int)
            or isinstance(self.pre_num, bool)
            or self.pre_num == 0
            or self.pre_num < -1
        ):
            faults.append(
                f"pre_num={fields.shown(self.pre_num)} must be a positive integer, or -1 for all earlier layers"
            )
        elif self.shortcut == "input" and self.pre_num != 1:
            faults.append(f"pre_num={fields.shown(self.pre_num)} with shortcut='input', which accepts 1 only (Eq. 2)")
        if self.use_dora and self.shortcut != "block":
            faults.append(
                f"use_dora={fields.shown(self.use_dora)} with shortcut={fields.shown(self.shortcut)}, whose merge is "
                "an estimate, and with it the norms of the merged weight; choose shortcut='block'"
            )
        if self.nested_ranks and (self.use_dora or self.total_step is not None):
            other = "use_dora=True" if self.use_dora else "total_step (AdaLoRA)"
            faults.append(f"nested_ranks=True with {other}, which are two kinds of blocks; choose one")
        cuts = self.chain_cuts
        if cuts not in (AUTO, BY_NUMBER) and not (isinstance(cuts, list) and all(isinstance(c, str) for c in cuts)):
            known_ones = f"{AUTO!r}, {BY_NUMBER!r} or a list of names of modules"
            faults.append(f"chain_cuts={fields.shown(cuts)} must be {known_ones}")
        return faults

    def _adalora_faults(self, faults: list[str]) -> list[str]:
        """What is wrong with AdaLoRA's fields together; nothing while there are other `faults`."""
        if faults:
            return []
        if self.total_step is None:
            defaults = {f.name: f.default for f in dataclasses.fields(self)}
            chosen = [name for name in _ADALORA_FIELDS if getattr(self, name) != defaults[name]]
            return [
                f"{name}={fields.shown(getattr(self, name))} is a field of AdaLoRA, which total_step chooses; give "
                "that too, or leave it unset"
                for name in chosen
            ]
        given = f"total_step={self.total_step} (AdaLoRA)"
        rules = {
            f"{given} with use_dora=True, which are two kinds of blocks; choose one": self.use_dora,
            f"{given} with use_rslora=True, but its scaling is lora_alpha / (init_r + 1e-5); leave use_rslora unset": (
                self.use_rslora
            ),
            f"lora_alpha={self.lora_alpha} must be positive with {given}": self.lora_alpha <= 0,
            f"r={self.r} with {given}, whose rank is init_r={self.init_r}; leave r unset": (
                self.r not in (8, self.init_r)  # LoRA's default
            ),
            f"target_r={self.target_r} must be less than init_r={self.init_r}, or nothing is pruned": (
                self.target_r >= self.init_r
            ),
            f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} in which the "
            "budget could shrink": self.tinit >= self.total_step - self.tfinal,
            f"init_lora_weights={fields.shown(self.init_lora_weights)} with {given}, which starts in its own way, "
            "choose True or False": not isinstance(self.init_lora_weights, bool),
        }
        return [fault for fault, broken in rules.items() if broken]

    def _parameter_faults(self) -> list[str]:
        """What else the config asks for that no layer over a parameter has."""
        if not self.target_parameters:
            return []
        given = f"target_parameters={fields.shown(self.target_parameters)} with "
        rules = {
            f"shortcut={fields.shown(self.shortcut)}, which adds up what consecutive layers compute for the same "
            "token, but to the experts of each layer other tokens are routed; choose shortcut='block'": (
                self.shortcut in ("input", "middle")
            ),
            "use_dora=True, whose norms PEFT has of no parameter; leave it out": self.use_dora,
            "total_step (AdaLoRA), whose ranks are not those of each expert; leave it out": (
                self.total_step is not None
            ),
            "nested_ranks=True, whose directions are not those of each expert; leave it out": self.nested_ranks,
            f"lora_dropout={fields.shown(self.lora_dropout)}, but the update is added to the parameter and no input "
            "of A is there to be dropped; set lora_dropout=0": bool(self.lora_dropout),
            "fan_in_fan_out=True, but each parameter says itself how it is turned; leave it out": self.fan_in_fan_out,
            f"layers_to_transform={fields.shown(self.layers_to_transform)}, which PEFT reads for modules only; name "
            "the parameters of these layers in full, as in 'layers.0.mlp.experts.down_proj'": (
                self.layers_to_transform is not None
            ),
            "init_lora_weights='orthogonal', which is made of one weight; choose True or 'gaussian'": (
                self.init_lora_weights == "orthogonal"
            ),
        }
        return [given + fault for fault, broken in rules.items() if broken]

    def _lora_faults(self) -> list[str]:
        known = {f.name for f in dataclasses.fields(LoraConfig)}
        faults = [
            f"{name}={fields.shown(value)} changes what a LoRA block computes and is not supported with shortcuts, "
            "leave it unset"
            for name, harmless in _REFUSED_FIELDS.items()
            if name in known and (value := getattr(self, name)) not in harmless
        ]
        if self.init_lora_weights not in _INITS:
            faults.append(
                f"init_lora_weights={fields.shown(self.init_lora_weights)} changes the base weight or needs its own "
                f"preparation, choose one of {', '.join(map(repr, _INITS))}"
            )
        elif self.init_lora_weights == "orthogonal" and self.shortcut == "middle":
            faults.append(
                "init_lora_weights='orthogonal' makes only B_n A_n zero, not the B_n A_{n-1} of shortcut='middle', "
                "choose True or 'gaussian'"
            )
        return faults
