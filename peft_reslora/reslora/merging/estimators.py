"""How a chain of ResLoRA blocks becomes one low-rank update per layer.

ResLoRA, arXiv 2402.18039, Eq. 5-13. Everything here is a function of factors, recorded norms and base weights; it
reads all layers of a chain and changes none, so the order in which layers are merged later does not matter.

E_n `(r, in_features)` is what stands for the term of layer n's shortcut in a merge, as a linear map of x_n, whatever
estimates it. C_n is an E_n that was fitted (`calibrate_merge`) or frozen (annealing), and is kept with the layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_reslora.reslora.blocks.adalora import SINGULAR_VALUES
from peft_reslora.reslora.blocks.convolution import are_kernels, factors_of_kernels
from peft_reslora.reslora.blocks.embedding import EmbeddingBlock
from peft_reslora.reslora.blocks.linear import FACTOR_KEYS
from peft_reslora.reslora.blocks.nested import first_numbers
from peft_reslora.reslora.chain_table import (
    EMBEDDING,
    ChainTable,
    Target,
    chain_settings,
    find_chains,
    kernel_kind,
    reach,
)
from peft_reslora.reslora.config import ResLoRAConfig
from peft_reslora.reslora.cuts import cuts_of
from peft_reslora.shared.fields import refuse_slow_patterns, shown
from peft_reslora.shared.names import OUT_PROJECTION, PREFIX
from peft_reslora.shared.patterns import by_pattern, scaling_of
from peft_reslora.shared.tensors import widen

# The buffers of a layer that keeps a C_n: C_n, and either the sketch of the factors it was fitted for, or the share t
# with which it takes part in the forward pass.
SHORTCUT_PARTS = ("lora_shortcut", "lora_calibrated", "lora_annealed")
UNRECORDED = -1.0  # in a norm window: no training forward yet (a root mean square is never negative)
_ENTRIES_AT_ONCE = 2**19  # of a base weight: 2 MiB in float32, which a core's caches hold
_CANCELLED = 1e-3  # share of the squares of two parts below which that of their sum is computed from the sum itself
_DRIFT = 0.01  # by how much, in relation to their norm, factors may differ from those that were calibrated


@dataclass
class Block:
    """One layer's LoRA block as merging sees it.

    Args:
        name: the layer's path, for messages.
        A: `(r, in_features)`.
        B: `(out_features, r)`.
        scaling: s_n.
        norms: the window of root mean squares that 'input_norm' averages; None if the adapter records none.
        base_weight: gives W_n, `(out_features, in_features)`, without any adapter; None where there is no base.
        shortcut: C_n; None if there is none.
        sketch: `factor_sketch` of the factors for which C_n was fitted; None if there are none, or C_n is part of the
            forward pass.
        annealed: the share t with which C_n has taken the shortcut's place in the forward pass.
        size: of the kernel, if the layer is a convolution.
        kind: that of the layer's `Target`.
        groups: of the convolution, which share the directions evenly.
    """

    name: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    norms: torch.Tensor | None = None
    base_weight: Callable[[], torch.Tensor] | None = None
    shortcut: torch.Tensor | None = None
    sketch: torch.Tensor | None = None
    annealed: float = 0.0
    size: tuple[int, ...] = ()
    kind: str = ""
    groups: int = 1

    def factors(self, like: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """A and s B in float32 (or as wide as they are), on the device of `like`."""
        A, B = widen(self.A), self.scaling * widen(self.B)
        return (A, B) if like is None else (A.to(like.device), B.to(like.device))


def first_directions(block: Block, rank: int, config: ResLoRAConfig) -> Block:
    """The block of rank `rank` in one of nested ranks (`blocks/nested.py`); itself, if it has no more directions."""
    r = block.A.shape[0]
    first = first_numbers(rank, r, block.groups)
    if len(first) == r:
        return block
    return dataclasses.replace(
        block,
        A=block.A[first],
        B=block.B[:, first],
        scaling=block.scaling * scaling_of(config, len(first), 1.0) / scaling_of(config, r, 1.0),
        shortcut=None if block.shortcut is None else block.shortcut[first],
        sketch=None if block.sketch is None else block.sketch.unflatten(0, (2, r))[:, first].flatten(),
    )


def merged_factors(
    chain: Sequence[Block], position: int, config: ResLoRAConfig, weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `(R, in_features)` and `(out_features, R)` of layer n's merged delta weight B @ A.

    `weights` are the layer's of `shortcut_coefficients`: a_{n-1}, a_{n-2}, ...
    """
    A, B = chain[position].factors()
    if config.shortcut == "block":  # Eq. 5: sum_k s_{n-k} B_{n-k} A_{n-k}
        pairs = [(A, B), *(b.factors(like=A) for b in _earlier(chain, position, config))]
        return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
    return A + shortcut_estimate(chain, position, config, weights), B


def shortcut_estimate(
    chain: Sequence[Block], position: int, config: ResLoRAConfig, weights: Sequence[float]
) -> torch.Tensor:
    """E_n of an 'input' or 'middle' shortcut.

    Where C_n has taken a share t of the shortcut's place in the forward pass, that share is exact, and only the rest
    is estimated: E_n is t C_n plus (1 - t) times what the estimator gives.
    """
    block = chain[position]
    A, t = block.factors()[0], block.annealed
    C = None if block.shortcut is None else block.shortcut.to(A)
    if t == 1.0 and C is not None:
        return C
    if config.merge_estimator == "least_squares" and C is not None:
        estimate = C
    elif config.shortcut == "middle" and config.merge_estimator == "weight_norm":  # Eq. 13
        earlier = (b.factors(like=A)[0] for b in _earlier(chain, position, config))
        estimate = sum((a * A for a, A in zip(weights, earlier, strict=True)), torch.zeros_like(A))
    else:  # Eq. 7 and 12
        estimate = sum(weights) * A
    return estimate if C is None or t == 0.0 else torch.lerp(estimate, C, t)


def _earlier(chain: Sequence[Block], position: int, config: ResLoRAConfig) -> list[Block]:
    return [chain[position - k] for k in range(1, reach(position, config.pre_num) + 1)]


class Exactness(NamedTuple):
    """Whether the merge of a layer computes what its forward pass does, and why."""

    exact: bool
    why: str


def exactness(chain: Sequence[Block], position: int, config: ResLoRAConfig) -> Exactness:
    """Of one layer, whichever estimator there is.

    For a chain's first layer, 'middle' has no shortcut and that of 'input' is the layer's own input.
    """
    if config.shortcut == "block":
        return Exactness(True, "its updates are fixed matrices")
    if position == 0:
        return Exactness(True, "first of its chain")
    if chain[position].annealed == 1.0:
        return Exactness(True, "annealed")
    return Exactness(False, f"estimated by {config.merge_estimator}")


def is_exact(chain: Sequence[Block], config: ResLoRAConfig) -> bool:
    """Whether the merge of every layer is exact."""
    return all(exactness(chain, position, config).exact for position in range(len(chain)))


def shortcut_coefficients(chain: Sequence[Block], config: ResLoRAConfig) -> list[list[float]]:
    """For each layer n of the chain the a_{n-1}, a_{n-2}, ... with which its shortcuts enter the merge.

    input: a_{n-1} stands for x_{n-1} in terms of x_n, and the first layer has exactly 1, since x_{-1} := x_0.
    middle: a_{n-k} stands for A_{n-k} x_{n-k} in terms of A_n x_n (input_norm) or x_n (weight_norm).
    They are zero where C_n takes the shortcut's place.

    Raises:
        ValueError: if the estimator's data is missing, zero or not finite; it names the layer and the way to it.
    """
    earlier = [reach(n, config.pre_num) for n in range(len(chain))]
    if config.shortcut == "block":
        return [[1.0] * m for m in earlier]
    match "drop" if is_exact(chain, config) else config.merge_estimator:
        case "drop":
            coefficients = [[0.0] * m for m in earlier]
        case "least_squares":  # C_n takes the place of all of them
            for position, block in enumerate(chain):
                _check_calibration(block, is_linked=position > 0)
            coefficients = [[0.0] * m for m in earlier]
        case "input_norm":  # a_{n-k} = f_{n-k} / f_n (Eq. 9 and 12)
            f = [_mean_norm(block) for block in chain]
            coefficients = [[f[n - k] / f[n] for k in range(1, m + 1)] for n, m in enumerate(earlier)]
        case _:
            coefficients = _weight_norm_coefficients(chain, config)
    if config.shortcut == "input":
        coefficients[0] = [1.0]
    return coefficients


def _weight_norm_coefficients(chain: Sequence[Block], config: ResLoRAConfig) -> list[list[float]]:
    """a_{n-k} = f*_{n-k-1} / f*_{n-1} with f*_j = ||W*_j||_F of the merged weights, in chain order (Eq. 11 and 13).

    1 where there is no layer n-k-1.
    """
    f: list[float] = []
    coefficients: list[list[float]] = []
    for n, block in enumerate(chain):
        m = 1 if config.shortcut == "input" and n == 0 else reach(n, config.pre_num)
        coefficients.append([f[n - k - 1] / f[n - 1] if n - k - 1 >= 0 else 1.0 for k in range(1, m + 1)])
        if n == len(chain) - 1:
            break
        if block.base_weight is None:
            raise ValueError(
                f"merge_estimator='weight_norm' needs the base weight of layer {block.name!r}, which is not in the "
                "adapter's files. Load the adapter onto its base model, or set merge_estimator to another."
            )
        A, B = merged_factors(chain, n, config, coefficients[n])
        f.append(_checked_norm(norm_of_sum(block.base_weight().to(B.device), A, B), block.name, "merged weight"))
    return coefficients


def norm_of_sum(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> float:
    """||W + B A||_F, by ||W||^2 + 2 <B^T W, A> + <B^T B, A A^T>: nothing of W's size is made, and W is read once.

    Unless the sum is so much smaller than W and B A that their difference would be lost in rounding.
    """
    norms, projected = [], torch.zeros_like(A)  # of parts of W; B^T W
    step = max(1, _ENTRIES_AT_ONCE // W.shape[1])
    for rows, own in zip(W.split(step), B.split(step), strict=True):
        rows = rows.to(A.dtype)
        norms.append(torch.linalg.vector_norm(rows))
        projected.addmm_(own.t(), rows)
    squares = torch.stack(norms).double().square().sum()
    update = ((B.t() @ B).double() * (A @ A.t()).double()).sum()
    square = squares + 2 * (projected.double() * A.double()).sum() + update
    parts, square = torch.stack([squares + update, square]).tolist()
    if math.isfinite(square) and square < _CANCELLED * parts:
        return float(torch.linalg.matrix_norm(torch.addmm(W.to(B), B, A)))
    return math.sqrt(square) if math.isfinite(square) else square


def _mean_norm(block: Block) -> float:
    """f_n: the mean over the window of the root mean square that was recorded."""
    recorded = None if block.norms is None else block.norms.double()[block.norms != UNRECORDED]
    if recorded is None or recorded.numel() == 0:
        raise ValueError(
            f"merge_estimator='input_norm' has no norms recorded on layer {block.name!r}. They are recorded by "
            "forward passes in training mode: model.train(); model(**batch). Or set merge_estimator to 'weight_norm' "
            "or 'drop'."
        )
    return _checked_norm(float(recorded.mean()), block.name, "recorded input")


def _check_calibration(block: Block, is_linked: bool) -> None:
    """Refuse to merge with a C_n that is missing, or was fitted while this layer had other factors.

    C_n belongs to the factors of all layers before it, whose outputs it was fitted on; so every layer has a sketch,
    the first of a chain too, which has no C_n (nor has it a sketch in adapters saved by 0.1.0). Factors may have been
    rounded by a cast, or moved by less than a hundredth: the regression's residual is larger.
    """
    if block.annealed > 0.0:  # C_n is part of the forward pass, whatever it was fitted for
        return
    if block.sketch is None and not is_linked:
        return
    if block.sketch is None or (block.shortcut is None and is_linked):
        raise ValueError(
            f"merge_estimator='least_squares' needs a calibrated adapter, and the one on layer {block.name!r} is not. "
            "Call calibrate_merge(model, batches), or set config.merge_estimator to 'input_norm', 'weight_norm' or "
            "'drop'."
        )
    fitted, now = block.sketch.chunk(2), factor_sketch(block.A, block.B).to(block.sketch).chunk(2)
    if any((b - a).norm() > _DRIFT * a.norm() for a, b in zip(fitted, now, strict=True)):
        raise ValueError(
            f"The factors of layer {block.name!r} have changed since they were calibrated, so "
            "merge_estimator='least_squares' has no valid estimate. Call calibrate_merge(model, batches) again."
        )


def factor_sketch(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """A u and v B for two fixed vectors, `(2 r,)`: tells whether factors have changed, at the price of 2 r numbers."""
    u, v = (torch.arange(n, dtype=torch.float64, device=A.device).square().cos() for n in (A.shape[1], B.shape[0]))
    return torch.cat([A.double() @ u, v.to(B.device) @ B.double()]).float()


def _checked_norm(norm: float, name: str, what: str) -> float:
    if not math.isfinite(norm) or norm <= 0.0:
        raise ValueError(
            f"The norm of the {what} of layer {name!r} is {norm}, from which no merge can be estimated. Look for NaN "
            "or inf in the adapter and its inputs, or set merge_estimator='drop'."
        )
    return norm


def check_finite(A: torch.Tensor, B: torch.Tensor, name: str, adapter_name: str) -> None:
    """Refuse factors with NaN or inf.

    Raises:
        ValueError: naming adapter and layer.
    """
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError(
            f"NaN or inf in the merged factors of adapter {adapter_name!r} on layer {name!r}: the adapter is broken. "
            "Load an earlier checkpoint, or train again with a lower learning rate."
        )


def blocks_from_state_dict(config: ResLoRAConfig, state_dict: Mapping[str, torch.Tensor]) -> dict[str, Block]:
    """The blocks in a saved adapter, by the layer's path in the base model.

    Raises:
        ValueError: if one of the two factors of a layer is missing or their shapes do not fit together, or the adapter
            has parameters among its targets.
    """
    if config.target_parameters:
        raise ValueError(
            f"The adapter has target_parameters={shown(config.target_parameters)}, and only the base model tells "
            "whose are the factors in its file. Load it onto the base model: describe_chains(model), "
            "export_lora(model)."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state_dict.items():
        for part in (*FACTOR_KEYS, *EmbeddingBlock.factor_names, SINGULAR_VALUES, "lora_norm", *SHORTCUT_PARTS):
            if key.endswith(f".{part}"):
                parts.setdefault(key.removesuffix(f".{part}").removeprefix(PREFIX), {})[part] = tensor
    refuse_slow_patterns(config, parts)
    blocks = {}
    for name, found in parts.items():
        is_embedding = EmbeddingBlock.factor_names[0] in found
        A, B = (found.get(key) for key in (EmbeddingBlock.factor_names if is_embedding else FACTOR_KEYS))
        size, groups = () if A is None else tuple(A.shape[2:]), 1
        if A is not None and B is not None and are_kernels(A, B):
            groups = A.shape[0] // B.shape[1]
            A, B = factors_of_kernels(A, B)
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            shapes = {part: tuple(tensor.shape) for part, tensor in found.items()}
            raise ValueError(
                f"The checkpoint does not hold a pair of factors (r, in_features), (out_features, r) for layer "
                f"{name!r}, but {shapes}. It is damaged or not a ResLoRA adapter; save the adapter again."
            )
        _check_shortcut_parts(name, A, found)
        B = _fold(config, name, B, found.get(SINGULAR_VALUES))
        C, sketch, annealed = (found.get(part) for part in SHORTCUT_PARTS)
        target = name.removesuffix(OUT_PROJECTION)
        scaling = config.scaling(A.shape[0], by_pattern(config.alpha_pattern, target, config.lora_alpha))
        t = 0.0 if annealed is None else float(annealed)
        kind = EMBEDDING if is_embedding else kernel_kind(size)
        blocks[name] = Block(name, A, B, scaling, found.get("lora_norm"), None, C, sketch, t, size, kind, groups)
    return blocks


def _fold(config: ResLoRAConfig, name: str, B: torch.Tensor, E: torch.Tensor | None) -> torch.Tensor:
    """B E `(out_features, r)` of an adapter with AdaLoRA, B of another one."""
    expected = (B.shape[1], 1) if config.total_step is not None else None
    if (None if E is None else tuple(E.shape)) != expected:
        shape = "is missing" if E is None else f"has the shape {tuple(E.shape)}"
        raise ValueError(
            f"{SINGULAR_VALUES} of layer {name!r} {shape}, and the config says {expected or 'that there is none'}: "
            "config and tensors are not of one adapter. Take both from one save."
        )
    return B if E is None else widen(B) * widen(E).t()


def _check_shortcut_parts(name: str, A: torch.Tensor, found: Mapping[str, torch.Tensor]) -> None:
    """Refuse an estimate of another shape, and a share of one that is not there."""
    C, sketch, annealed = (found.get(part) for part in SHORTCUT_PARTS)
    faults = []
    if C is not None and C.shape != A.shape:
        faults.append(f"{SHORTCUT_PARTS[0]} has the shape {tuple(C.shape)} instead of A's {tuple(A.shape)}")
    if annealed is not None and C is None:
        faults.append(f"it holds {SHORTCUT_PARTS[2]} without {SHORTCUT_PARTS[0]}")
    if C is not None and sketch is None and annealed is None:
        faults.append(f"it holds {SHORTCUT_PARTS[0]} and nothing that says what it is for")
    if sketch is not None and sketch.shape != (2 * A.shape[0],):
        faults.append(f"{SHORTCUT_PARTS[1]} has the shape {tuple(sketch.shape)} instead of {(2 * A.shape[0],)}")
    if annealed is not None and not (annealed.numel() == 1 and 0.0 <= float(annealed) <= 1.0):
        faults.append(f"{SHORTCUT_PARTS[2]} is no share between 0 and 1")
    if faults:
        raise ValueError(
            f"The checkpoint's estimate of the shortcut for layer {name!r} cannot be used: {'; '.join(faults)}. It is "
            "damaged; calibrate or anneal, and save the adapter again."
        )


def chains_of_blocks(config: ResLoRAConfig, blocks: Mapping[str, Block]) -> ChainTable:
    """The chains that the layers of a saved adapter form."""
    targets = [
        Target(name, b.A.shape[1] // math.prod(b.size), b.B.shape[0], b.A.shape[0], b.kind)
        for name, b in blocks.items()
    ]
    return find_chains(targets, *chain_settings(config), cuts_of(config, targets))
