"""LoRA-RITE: the update of B A does not depend on the factors, and is the one of the equations without factors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import FLOAT64, MODEL64
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model

from peft_reslora import ResLoRAConfig
from peft_reslora.optim import FactorPair, LoRAPro, LoRARite, factor_pairs

Make = Callable[[list[FactorPair]], torch.optim.Optimizer]
float64 = pytest.mark.usefixtures("float64")
S = 1.3


def products(make: Make, A: torch.Tensor, B: torch.Tensor, steps: int, seed: int) -> list[torch.Tensor]:
    """B A after each step on one more random batch of a regression that is not linear in B A."""
    pair = FactorPair("layer", A.clone().requires_grad_(), B.clone().requires_grad_(), S)
    optimizer = make([pair])
    generator = torch.Generator().manual_seed(seed)
    after = []
    for _ in range(steps):
        x = torch.randn(12, A.shape[1], generator=generator, dtype=torch.float64)
        y = torch.randn(12, B.shape[0], generator=generator, dtype=torch.float64)
        (torch.tanh(S * x @ pair.A.T @ pair.B.T) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after.append((pair.B @ pair.A).detach())
    return after


def invertible(r: int, spread: float, generator: torch.Generator) -> torch.Tensor:
    """Random, with singular values from 1 / spread to spread."""
    left, right = (torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    powers = torch.rand(r, generator=generator, dtype=torch.float64) * 2 - 1
    return left * spread**powers @ right


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 4),
    sizes=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    spread=st.sampled_from([1.0, 3.0, 30.0]),
    start=st.sampled_from(["random", "zero"]),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 10_000),
)
def test_the_update_is_the_same_for_all_factors_of_one_product(r, sizes, spread, start, decay, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, sizes[0], generator=generator, dtype=torch.float64)
    B = torch.randn(sizes[1], r, generator=generator, dtype=torch.float64) * (start == "random")
    R = invertible(r, spread, generator)

    def make(pairs: list[FactorPair]) -> torch.optim.Optimizer:
        return LoRARite(pairs, lr=0.03, betas=(0.8, 0.9), weight_decay=decay)

    ours = products(make, A, B, 5, seed)
    transformed = products(make, R @ A, B @ torch.linalg.inv(R), 5, seed)
    for step, (one, other) in enumerate(zip(ours, transformed, strict=True)):
        assert relative_error(other, one) < MODEL64, step
    assert relative_error(ours[-1], ours[0]) > 1e-3


OTHERS: dict[str, Make] = {
    "AdamW": lambda pairs: torch.optim.AdamW([factor for pair in pairs for factor in (pair.A, pair.B)], lr=0.03),
    "LoRA-Pro": lambda pairs: LoRAPro(pairs, lr=0.03),  # to first order in lr it does not
}


@float64
@pytest.mark.parametrize("name", list(OTHERS))
def test_other_optimizers_depend_on_the_factors(name):
    """So the property above is one that the test can see."""
    generator = torch.Generator().manual_seed(0)
    A, B, R = torch.randn(3, 6), torch.randn(5, 3), invertible(3, 3.0, generator)
    ours = products(OTHERS[name], A, B, 5, 0)
    transformed = products(OTHERS[name], R @ A, B @ torch.linalg.inv(R), 5, 0)
    assert relative_error(transformed[-1], ours[-1]) > 1e-5


def direction_by_projections(
    G: torch.Tensor, other: torch.Tensor, state: dict[str, torch.Tensor], step: int, betas: tuple[float, float]
) -> torch.Tensor:
    """The equations with projections P onto the columns of `other` in place of bases: all in the space of Z's rows.

    Args:
        G: the gradient by factor @ other.T.
    """
    P = other @ torch.linalg.pinv(other, rtol=1e-10)
    carried = P @ state["V"] @ P
    lost = (torch.linalg.eigvalsh(state["V"]) - torch.linalg.eigvalsh(carried)).max()
    state["rho"] = betas[1] * (state["rho"] + lost)
    state["V"] = betas[1] * carried + (1 - betas[1]) * P @ G.T @ G @ P / len(G)
    values, vectors = torch.linalg.eigh((state["V"] + state["rho"] * P) / (1 - betas[1] ** step))
    roots = torch.where(values > 1e-12, values.clamp_min(1e-12) ** -0.5, 0.0)
    S_t = G @ P @ (vectors * roots @ vectors.T)
    state["M"] = betas[0] * state["M"] @ P + (1 - betas[0]) * S_t
    return state["M"] / (1 - betas[0] ** step) @ torch.linalg.pinv(other.T, rtol=1e-10)


@float64
@pytest.mark.parametrize(("r", "in_features", "out_features"), [(3, 7, 5), (1, 4, 6), (4, 6, 3)])
def test_the_update_is_that_of_the_equations_written_with_projections(r, in_features, out_features):
    torch.manual_seed(0)
    pair = FactorPair("layer", torch.randn(r, in_features, requires_grad=True),
                      torch.randn(out_features, r, requires_grad=True), S)  # fmt: skip
    A, B, X, Y = (
        pair.A.detach().clone(),
        pair.B.detach().clone(),
        torch.randn(in_features, 9),
        torch.randn(out_features, 9),
    )
    lr, betas, decay = 0.05, (0.8, 0.9), 0.1
    optimizer = LoRARite([pair], lr=lr, betas=betas, eps=1e-14, weight_decay=decay)
    zero = torch.zeros(())
    states = {
        "A": {"V": torch.zeros(out_features, out_features), "M": torch.zeros(in_features, out_features), "rho": zero},
        "B": {"V": torch.zeros(in_features, in_features), "M": torch.zeros(out_features, in_features), "rho": zero},
    }
    for step in range(1, 7):
        (0.5 * (S * pair.B @ pair.A @ X - Y).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        G = S * (S * B @ A @ X - Y) @ X.T
        along_A = direction_by_projections(G.T, B, states["A"], step, betas).T
        along_B = direction_by_projections(G, A.T, states["B"], step, betas)
        A, B = (1 - lr * decay) * A - lr * along_A, (1 - lr * decay) * B - lr * along_B
        assert relative_error(pair.A, A) < MODEL64, step
        assert relative_error(pair.B, B) < MODEL64, step
    assert float(states["B"]["rho"]) > 0  # what was lost by the changes of the space had a part in it


@float64
def test_a_pair_with_b_zero_starts_with_b():
    A = torch.randn(3, 7)
    pair = FactorPair("layer", A.clone().requires_grad_(), torch.zeros(5, 3, requires_grad=True), S)
    pair.A.grad, pair.B.grad = torch.zeros_like(A), torch.randn(5, 3)
    optimizer = LoRARite([pair], lr=0.1)
    optimizer.step()
    assert torch.equal(pair.A, A)
    moved = pair.B.detach() @ A
    assert 0.05 < float(moved.square().mean().sqrt()) < 0.2  # of B A, by about lr: the size of Adam's steps


@float64
def test_fewer_tokens_than_ranks_are_no_noise():
    """The directions that a gradient lacks are those of rounding, and are not blown up to steps."""
    torch.manual_seed(0)
    pair = FactorPair("layer", torch.randn(4, 7, requires_grad=True), torch.randn(5, 4, requires_grad=True), S)
    G = torch.randn(5, 1) @ torch.randn(1, 7)
    optimizer = LoRARite([pair], lr=0.1)
    pair.A.grad, pair.B.grad = S * pair.B.detach().T @ G, S * G @ pair.A.detach().T
    before = pair.B.detach().clone()
    optimizer.step()
    step = torch.linalg.svdvals((before - pair.B.detach()) @ pair.A.detach())
    assert float(step[1]) < 1e-5 * float(step[0])
    assert float(step[0]) > FLOAT64


@float64
@pytest.mark.parametrize("shortcut", ["input", "block"])
def test_a_models_updates_are_the_same_for_all_factors_of_its_products(shortcut):
    """Also where a pair takes part in several layers: for 'block', all of them see the product alone."""
    config = ResLoRAConfig(r=3, target_modules=["q_proj", "v_proj"], shortcut=shortcut)
    model = randomize_adapters(get_peft_model(TINY_MODELS["llama"].make(), config)).train()
    transformed, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pair in factor_pairs(transformed):
            R = invertible(3, 3.0, generator)
            pair.A.copy_(R @ pair.A)
            pair.B.copy_(pair.B @ torch.linalg.inv(R))
    before = [(pair.B @ pair.A).detach() for pair in factor_pairs(model)]
    ids = TINY_MODELS["llama"].inputs()["input_ids"]
    for one in (model, transformed):
        optimizer = LoRARite(factor_pairs(one), lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            one(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    for ours, theirs, start in zip(factor_pairs(model), factor_pairs(transformed), before, strict=True):
        step = (ours.B @ ours.A).detach() - start
        # Of a step that is divided by the size of its gradient, whose smallest directions have the fewest digits.
        assert relative_error((theirs.B @ theirs.A).detach() - start, step) < 1e3 * MODEL64, ours.layer
