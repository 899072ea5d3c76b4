"""LoRA-RITE (arXiv 2410.20625): updates of B A that do not depend on how it is split into B and A.

Notation: Z = B A with A `(r, in_features)`, B `(out_features, r)`, and G the gradient of the loss by Z. The paper
writes Z = A B^T; its A is B here, and its B is A^T. Both factors are treated alike: `factor` `(n, r)` is the one that
is updated, B or A^T, and `other` `(m, r)` the other one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from peft_reslora.optim.pair_optimizer import Groups, PairOptimizer, decay_and_add
from peft_reslora.optim.pairs import FactorPair
from peft_reslora.shared.tensors import widen


class Polar(NamedTuple):
    """other = basis @ magnitude: orthonormal columns `(m, k)`, and the rest `(k, r)` with its inverse `(r, k)`.

    k is the rank. Any orthonormal basis of the column space serves as well as the paper's polar factor: what follows
    turns with the basis, and the update does not.
    """

    basis: torch.Tensor
    inverse: torch.Tensor


def polar(other: torch.Tensor) -> Polar:
    """From the singular value decomposition, without the singular values that are no more than rounding."""
    left, values, right = torch.linalg.svd(other, full_matrices=False)
    rounding = max(other.shape) * torch.finfo(other.dtype).eps
    kept = int((values > rounding * values[0]).sum())
    return Polar(left[:, :kept], right[:kept].t() / values[:kept])


def escaped_mass(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """d_lambda: the most that an eigenvalue has lost from `before` `(k, k)` to `after` `(l, l)`, each in its order.

    A projection makes no eigenvalue larger; where k and l differ, the missing ones are 0.
    """
    size = max(len(before), len(after))
    before, after = (
        torch.cat((m.new_zeros(size - len(m)), torch.linalg.eigvalsh(m))) if len(m) else m.new_zeros(size)
        for m in (before, after)
    )
    return (before - after).max().clamp_min(0) if size else before.new_zeros(())


def inverse_root(matrix: torch.Tensor, eps: float) -> torch.Tensor:
    """(matrix^(1/2) + eps)^-1 of a symmetric positive semidefinite `(k, k)`; eigenvalues are at least its rounding."""
    if not len(matrix):
        return matrix
    values, vectors = torch.linalg.eigh(matrix)
    least = values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors / (torch.maximum(values, least).clamp_min(0).sqrt() + eps) @ vectors.t()


def rite_direction(
    gradient: torch.Tensor, other: torch.Tensor, state: dict[str, Any], betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """The direction in which `factor` is updated, `(n, r)`; the state is moved on.

    With other = U R, the *unmagnified gradient* is g = grad R^-1, which is G U or its like, whatever R is; and with
    P = U_t^T U_{t-1}, the change of basis since the last step,

        V_t   = beta2 P V_{t-1} P^T + (1 - beta2) g^T g / n
        rho_t = beta2 (rho_{t-1} + d_lambda(V_{t-1}, P V_{t-1} P^T))
        S_t   = g (V_t + rho_t)^(-1/2)
        M_t   = beta1 M_{t-1} P^T + (1 - beta1) S_t
        direction = M_t R^-T,

    Algorithm 1 of the paper, whose V and rho are sums over the steps. The means with beta2, Adam's corrections for
    the start at zero and the division by n, by which `lr` means what it means for Adam, are those of the authors'
    published optimizer.

    Args:
        gradient: of the factor, `(n, r)`.
        other: `(m, r)`; where it is 0, as B at the start, the direction is 0.
        state: of the factor; empty at the first step.
    """
    basis, inverse = polar(other)
    unmagnified = gradient @ inverse
    if not state:
        state.update(
            step=0,
            basis=basis,
            exp_avg=torch.zeros_like(unmagnified),
            exp_cov=unmagnified.new_zeros(basis.shape[1], basis.shape[1]),
            escaped=unmagnified.new_zeros(()),
        )
    change = basis.t() @ state["basis"]
    carried = change @ state["exp_cov"] @ change.t()
    escaped = betas[1] * (state["escaped"] + escaped_mass(state["exp_cov"], carried))
    covariance = betas[1] * carried + (1 - betas[1]) * (unmagnified.t() @ unmagnified) / len(unmagnified)
    covariance = (covariance + covariance.t()) / 2
    step = state["step"] + 1
    compensated = covariance + escaped * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    preconditioned = unmagnified @ inverse_root(compensated / (1 - betas[1] ** step), eps)
    average = betas[0] * state["exp_avg"] @ change.t() + (1 - betas[0]) * preconditioned
    state.update(step=step, basis=basis, exp_avg=average, exp_cov=covariance, escaped=escaped)
    return average / (1 - betas[0] ** step) @ inverse.t()


class LoRARite(PairOptimizer):
    """LoRA-RITE (arXiv 2410.20625) over pairs of factors.

    For any invertible R `(r, r)`, the pairs (A, B) and (R A, B R^-1) are updated to pairs with the same B A, step
    after step, weight decay included. What G is for each adapter, is said in `LoRAPro`: for the shortcut 'block' the
    sum of the gradients of all layers in whose weights the pair takes part. The scaling s is not used: G takes it in,
    and S_t does not depend on the size of G.

    Both factors move by the direction of what they were before the step. Kept in memory are, for each factor, its
    first moment and a basis as large as the other factor: as much as Adam keeps.

    Args:
        params: pairs from `factor_pairs`, or groups: `{"pairs": pairs, "lr": ...}`, and `{"params": ...}` for
            parameters without a pair, which are updated as by AdamW.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, on A and B each, so that B A shrinks by its square.

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
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update_pair(self, pair: FactorPair, grad_A: torch.Tensor, grad_B: torch.Tensor, group: dict[str, Any]) -> None:
        A, B = widen(pair.A.detach()), widen(pair.B.detach())
        along_A = rite_direction(grad_A.t(), B, self.state[pair.A], group["betas"], group["eps"])
        along_B = rite_direction(grad_B, A.t(), self.state[pair.B], group["betas"], group["eps"])
        decay_and_add(pair.A, along_A.t(), group)
        decay_and_add(pair.B, along_B, group)
