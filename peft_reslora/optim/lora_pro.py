"""LoRA-Pro (arXiv 2407.18242): gradients of A and B that together come nearest to the gradient of the full update.

Notation: the update is s B A with A `(r, in_features)` and B `(out_features, r)`, and G `(out_features, in_features)`
is the gradient of the loss by the update as a whole. The gradients of the factors are g_A = s B^T G and g_B = s G A^T;
a step along any h_A and h_B moves the update, to first order, along the *equivalent gradient*

    s B h_A + s h_B A.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch

from peft_reslora.optim.pair_optimizer import Groups, PairOptimizer, adam_direction, decay_and_add
from peft_reslora.optim.pairs import FactorPair
from peft_reslora.shared.tensors import widen

Update = Literal["adamw", "sgd"]


class Thin(NamedTuple):
    """A singular value decomposition left diag(values) right^T, without the values that count as zero."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor


def thin_svd(matrix: torch.Tensor, rtol: float) -> Thin:
    """The singular values above `rtol` of the largest, with their vectors; none, of a matrix that is zero."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((values > rtol * values[0]).sum())
    return Thin(left[:, :kept], values[:kept], right[:kept].t())


def seen_gradient(
    A: Thin, B: Thin, grad_A: torch.Tensor, grad_B: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gradients of the factors tell of G: U^T G and G V, with U spanning the columns of B, V the rows of A.

    With B = U S Q^T it is g_A = s Q S U^T G, so that U^T G = S^-1 Q^T g_A / s; g_B likewise.
    """
    left = (B.right.t() @ grad_A) / (scaling * B.values[:, None])
    right = (grad_B @ A.left) / (scaling * A.values)
    return left, right


def equivalent_gradient(A: Thin, B: Thin, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The equivalent gradient that is nearest to G: P_B G + (1 - P_B) G P_A, with P_B = U U^T and P_A = V V^T.

    Args:
        left: U^T G.
        right: G V.
    """
    return (B.left @ left).addmm_(outside(B, right), A.right.t())


def outside(B: Thin, matrix: torch.Tensor) -> torch.Tensor:
    """(1 - P_B) `matrix`: what B cannot reach."""
    return matrix - B.left @ (B.left.t() @ matrix)


def adjusted_gradients(
    A: Thin, B: Thin, left: torch.Tensor, right: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The h_A and h_B of the equivalent gradient that is nearest to G; of all such, those nearest to g_A and g_B.

    All minimizers of ||s B h_A + s h_B A - G||_F are, with any X `(r, r)` (Theorem 2.1),

        h_A = (1 / s^2) (B^T B)^-1 g_A + X A
        h_B = (1 / s^2) (1 - P_B) g_B (A A^T)^-1 - B X,

    and ||h_A - g_A||^2 + ||h_B - g_B||^2 is least for the X with (Theorem 2.3)

        B^T B X + X A A^T = -(1 / s^2) (B^T B)^-1 g_A A^T.

    Both matrices of this Sylvester equation are symmetric, so in their eigenvectors, the singular vectors of B and A,
    each entry of X stands alone. Inverses are pseudo-inverses: while B is 0, as at the start, h_A is 0.

    Args:
        left: U^T G, see `seen_gradient`.
        right: G V.
    """
    by_B, by_A = left / B.values[:, None], outside(B, right) / A.values
    X = -(by_B @ A.right) * A.values / (B.values[:, None] ** 2 + A.values**2)
    h_A = B.right @ (by_B + X * A.values @ A.right.t())
    h_B = (by_A - B.left @ (B.values[:, None] * X)) @ A.left.t()
    return h_A / scaling, h_B / scaling


class LoRAPro(PairOptimizer):
    """LoRA-Pro (arXiv 2407.18242) over pairs of factors.

    'sgd' takes the adjusted gradients themselves: A <- A - lr h_A and B <- B - lr h_B, which moves the update along
    the nearest equivalent gradient to G, times lr. 'adamw' is the paper's AdamW: Adam's moments are those of the
    equivalent gradient, and what Adam makes of it takes the place of G: its h_A and h_B are subtracted. The moments
    are as large as the base weight, 2 out_features in_features numbers of float32 for each layer, so that memory is
    that of full fine-tuning.

    What G is:

    - LoRA, and DoRA with its norm as a constant: the gradient of the layer's weight.
    - shortcut 'input': h_n = W_n x_n + s_n B_n A_n (x_n + x_{n-1}), so G is the gradient of a weight on x_n + x_{n-1}.
    - shortcut 'block': the update s_n B_n A_n is added to the weights of all layers j = n .. n + pre_num of the chain,
      so G = sum_j G_j, the sum of the gradients of their weights, each of which is the equivalent gradient's target in
      a LoRA. A step moves these weights together, each by the same matrix, along what is nearest to that sum: it is
      the best step for what the layers share. It is not the best step for each layer by itself. That would be the
      pairs' h_A and h_B for which, summed over the layers, the misfit of each layer's own sum of equivalent gradients
      to its G_j is least: one problem for the whole chain, which needs each G_j, and the factors' gradients know only
      the sums.

    'middle' has no pairs, and no adapter has them while its shortcut is annealed, see `factor_pairs`: annealing that
    starts later needs another optimizer from the first.

    Args:
        params: pairs from `factor_pairs`, or groups: `{"pairs": pairs, "lr": ...}`, and `{"params": ...}` for
            parameters without a pair, which are updated as by AdamW.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on A and B each.
        update: 'adamw' or 'sgd'.
        rtol: singular values of a factor below this share of its largest count as zero. The gradients of A and B are
            divided by them, and with them their rounding. What B does not reach with them it gets from h_B.

    Raises:
        ValueError: for an option out of range, naming it, or for pairs that are none, naming the layer.
    """

    def __init__(
        self,
        params: Groups,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        update: Update = "adamw",
        rtol: float = 1e-3,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "update": update, "rtol": rtol}
        super().__init__(params, options)

    def check_options(self, options: dict[str, Any]) -> None:
        super().check_options(options)
        if options["update"] not in get_args(Update):
            raise ValueError(f"update={options['update']!r} is not known; choose from {', '.join(get_args(Update))}.")
        if not 0 < options["rtol"] < 1 or math.isnan(options["rtol"]):
            raise ValueError(f"rtol={options['rtol']!r} must be between 0 and 1.")

    def update_pair(self, pair: FactorPair, grad_A: torch.Tensor, grad_B: torch.Tensor, group: dict[str, Any]) -> None:
        A, B = (thin_svd(widen(factor.detach()), group["rtol"]) for factor in (pair.A, pair.B))
        left, right = seen_gradient(A, B, grad_A, grad_B, pair.scaling)
        if group["update"] == "adamw":
            equivalent = equivalent_gradient(A, B, left, right)
            direction = adam_direction(equivalent, self.state[pair.B], group["betas"], group["eps"])
            left, right = B.left.t() @ direction, direction @ A.right
        h_A, h_B = adjusted_gradients(A, B, left, right, pair.scaling)
        decay_and_add(pair.A, h_A, group)
        decay_and_add(pair.B, h_B, group)
