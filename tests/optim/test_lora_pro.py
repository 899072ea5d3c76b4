"""LoRA-Pro: the adjusted gradients against numeric least squares in float64, and what they mean for each shortcut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracle import factors_of, randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import FLOAT64, MODEL64
from peft import get_peft_model

from peft_reslora import ResLoRAConfig
from peft_reslora.optim import FactorPair, LoRAPro, factor_pairs

S = 1.7
float64 = pytest.mark.usefixtures("float64")


def pair_of(r: int, in_features: int, out_features: int, b: str = "full", seed: int = 0) -> FactorPair:
    torch.manual_seed(seed)
    B = torch.randn(out_features, r)
    if b == "zero":
        B = torch.zeros_like(B)
    elif b == "deficient":
        B[:, -1] = B[:, 0]
    return FactorPair("layer", torch.randn(r, in_features, requires_grad=True), B.requires_grad_(), S)


def set_gradients(pair: FactorPair, G: torch.Tensor) -> None:
    pair.A.grad, pair.B.grad = S * pair.B.detach().T @ G, S * G @ pair.A.detach().T


def as_matrix(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The map from h_A and h_B to S B h_A + S h_B A, on all entries in rows."""
    transposed = A.T.clone(memory_format=torch.contiguous_format)
    return S * torch.cat([torch.kron(B, torch.eye(A.shape[1])), torch.kron(torch.eye(B.shape[0]), transposed)], dim=1)


def nearest(A: torch.Tensor, B: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all h_A, h_B with the least ||S B h_A + S h_B A - G||, those nearest to S B^T G and S G A^T: by the singular
    value decomposition of the map as one matrix on all entries."""
    A, B = A.detach(), B.detach()
    to_update = as_matrix(A, B)
    lora = torch.cat([(S * B.T @ G).flatten(), (S * G @ A.T).flatten()])
    inverse = torch.linalg.pinv(to_update, rtol=1e-10)
    solution = inverse @ G.flatten() + lora - inverse @ (to_update @ lora)
    return solution[: A.numel()].view_as(A), solution[A.numel() :].view_as(B)


def moved(pair: FactorPair, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """How far one plain step with lr=1 moves A and B, against the direction."""
    before = pair.A.detach().clone(), pair.B.detach().clone()
    LoRAPro([pair], lr=1.0, update="sgd", **options).step()
    return before[0] - pair.A.detach(), before[1] - pair.B.detach()


@float64
@pytest.mark.parametrize("b", ["full", "zero", "deficient"])
@pytest.mark.parametrize(("r", "in_features", "out_features"), [(3, 7, 5), (1, 4, 6), (2, 2, 9), (4, 8, 3), (5, 3, 3)])
def test_adjusted_gradients_solve_the_least_squares_problem(r, in_features, out_features, b):
    pair = pair_of(r, in_features, out_features, b)
    A, B, G = pair.A.detach().clone(), pair.B.detach().clone(), torch.randn(out_features, in_features)
    set_gradients(pair, G)
    h_A, h_B = moved(pair)
    expected_A, expected_B = nearest(A, B, G)
    assert relative_error(B @ h_A + h_B @ A, B @ expected_A + expected_B @ A) < FLOAT64
    h, expected = (torch.cat([a.flatten(), b.flatten()]) for a, b in ((h_A, h_B), (expected_A, expected_B)))
    assert relative_error(h, expected) < FLOAT64


@float64
def test_adjusted_gradients_solve_the_papers_sylvester_equation():
    pair = pair_of(3, 7, 5)
    A, B, G = pair.A.detach().clone(), pair.B.detach().clone(), torch.randn(5, 7)
    set_gradients(pair, G)
    first = torch.linalg.inv(B.T @ B) @ pair.A.grad / S**2
    h_A, _ = moved(pair)
    X = (h_A - first) @ torch.linalg.pinv(A)
    assert relative_error(h_A, first + X @ A) < FLOAT64
    assert relative_error(B.T @ B @ X + X @ A @ A.T, -first @ A.T) < FLOAT64


@float64
def test_singular_values_below_rtol_are_left_to_the_gradient_of_b():
    pair = pair_of(2, 6, 5)
    with torch.no_grad():
        pair.B.copy_(torch.linalg.qr(pair.B)[0] * torch.tensor([1.0, 1e-5]))
    kept = pair.B.detach().clone() * torch.tensor([1.0, 0.0])
    A, G = pair.A.detach().clone(), torch.randn(5, 6)
    set_gradients(pair, G)
    h_A, h_B = moved(pair, rtol=1e-3)
    expected_A, expected_B = nearest(A, kept, G)
    assert float(h_A[1].norm()) < FLOAT64 * float(h_A.norm())
    assert relative_error(h_A, expected_A) < 1e-4  # the gradient of A still has the small direction in it
    assert relative_error(h_B, expected_B) < 1e-4


@float64
def test_adamw_has_the_moments_of_the_equivalent_gradient():
    pair = pair_of(3, 7, 5)
    A, B, X, Y = pair.A.detach().clone(), pair.B.detach().clone(), torch.randn(7, 9), torch.randn(5, 9)
    lr, betas, eps, decay = 0.05, (0.8, 0.9), 1e-8, 0.1
    optimizer = LoRAPro([pair], lr=lr, betas=betas, eps=eps, weight_decay=decay)
    first, second = torch.zeros(5, 7), torch.zeros(5, 7)
    for step in range(1, 7):
        set_gradients(pair, (S * pair.B @ pair.A @ X - Y).detach() @ X.T)
        optimizer.step()
        h_A, h_B = nearest(A, B, (S * B @ A @ X - Y) @ X.T)
        equivalent = S * (B @ h_A + h_B @ A)
        first = betas[0] * first + (1 - betas[0]) * equivalent
        second = betas[1] * second + (1 - betas[1]) * equivalent**2
        adam = first / (1 - betas[0] ** step) / ((second / (1 - betas[1] ** step)).sqrt() + eps)
        h_A, h_B = nearest(A, B, adam)
        A, B = (1 - lr * decay) * A - lr * h_A, (1 - lr * decay) * B - lr * h_B
        assert relative_error(pair.A, A) < MODEL64
        assert relative_error(pair.B, B) < MODEL64


@float64
@pytest.mark.parametrize("update", ["adamw", "sgd"])
def test_a_pair_with_b_zero_starts_with_b(update):
    pair = pair_of(3, 7, 5, "zero")
    A, G = pair.A.detach().clone(), torch.randn(5, 7)
    set_gradients(pair, G)
    LoRAPro([pair], lr=0.1, update=update).step()
    assert torch.equal(pair.A, A)
    assert float(pair.B.detach().norm()) > 0.01


# What G is, for 'block'.


def merged_gradients(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """G_j: the gradient of each layer's weight in a plain model whose weights have the updates of 'block' in them."""
    plain, factors = TINY_MODELS["llama"].make(), factors_of(model)
    weights = {name: plain.get_parameter(f"{name}.weight") for name in factors}
    with torch.no_grad():
        for name, weight in weights.items():
            for taken in (name, before(name)):
                if taken in factors:
                    A, B, s = factors[taken]
                    weight += s * B @ A
    plain(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in weights.items()}


def neighbor(name: str, distance: int) -> str:
    head, tail = name.split(".layers.")
    position, rest = tail.split(".", 1)
    return f"{head}.layers.{int(position) + distance}.{rest}"


def before(name: str) -> str:
    return neighbor(name, -1)


def after(name: str) -> str:
    return neighbor(name, 1)


@float64
def test_for_block_the_step_is_nearest_to_the_sum_of_the_gradients_of_all_layers_that_take_the_pair():
    config = ResLoRAConfig(r=2, lora_alpha=2 * S, target_modules=["q_proj", "v_proj"], shortcut="block", pre_num=1)
    model = randomize_adapters(get_peft_model(TINY_MODELS["llama"].make(), config))
    ids = TINY_MODELS["llama"].inputs()["input_ids"]
    of_layers = merged_gradients(model, ids)
    model(input_ids=ids, labels=ids).loss.backward()
    pairs = {pair.layer.removeprefix("base_model.model."): pair for pair in factor_pairs(model)}
    factors = {name: (pair.A.detach().clone(), pair.B.detach().clone()) for name, pair in pairs.items()}
    LoRAPro(list(pairs.values()), lr=1.0, update="sgd").step()
    steps = {}
    for name, pair in pairs.items():
        A, B = factors[name]
        h_A, h_B = A - pair.A.detach(), B - pair.B.detach()
        steps[name] = S * (B @ h_A + h_B @ A)
        total = of_layers[name] + of_layers.get(after(name), 0)
        assert relative_error(pair.A.grad, S * B.T @ total) < MODEL64
        assert relative_error(pair.B.grad, S * total @ A.T) < MODEL64
        expected_A, expected_B = nearest(A, B, total)
        assert relative_error(steps[name], S * (B @ expected_A + expected_B @ A)) < MODEL64
        if after(name) in pairs:  # and not to the gradient of the layer's own weight
            own_A, own_B = nearest(A, B, of_layers[name])
            assert relative_error(steps[name], S * (B @ own_A + own_B @ A)) > 0.1

    # Nor is it the least misfit of all layers together, which is a problem of the whole chain.
    chain = [name for name in pairs if name.endswith("q_proj")]
    own_misfit = sum(float((steps[name] + steps.get(before(name), 0) - of_layers[name]).norm() ** 2) for name in chain)
    maps = []
    for n, name in enumerate(chain):
        A, B = factors[name]
        column = as_matrix(A, B)
        rows = [torch.zeros_like(column)] * len(chain)
        rows[n : n + 2] = [column] * len(rows[n : n + 2])
        maps.append(torch.cat(rows))
    target = torch.cat([of_layers[name].flatten() for name in chain])
    together = torch.cat(maps, dim=1)
    least_misfit = float((together @ (torch.linalg.pinv(together, rtol=1e-10) @ target) - target).norm() ** 2)
    assert least_misfit < 0.95 * own_misfit
