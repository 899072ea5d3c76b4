"""MoRA's operators, delta weights and factors against an index-by-index oracle; the sizes of squares."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.mora import TYPES, dense_reference
from helpers.oracle import relative_error
from helpers.tolerances import FLOAT64

from peft_reslora.mora.operators import OPERATORS, delta_weight, rotation_table, sharing_factors, square_size

# (in, out, r): even and uneven divisions, squares larger than the input, the output, twice the input, and both
SHAPES = [(24, 16, 2), (33, 17, 2), (8, 96, 3), (96, 8, 3), (20, 2, 4), (2, 20, 8), (5, 7, 9), (1, 1, 1), (64, 64, 1)]


def random_square(shape: tuple[int, int, int], mora_type: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    q = square_size(*shape, mora_type)
    return torch.randn(q, q, dtype=dtype)


@pytest.mark.parametrize("mora_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_operator_delta_weight_and_gradients_equal_the_oracle(shape, mora_type):
    in_features, out_features, _ = shape
    M = random_square(shape, mora_type).requires_grad_()
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    dense = dense_reference(M, in_features, out_features, mora_type)
    expected = x @ dense.T
    actual = OPERATORS[mora_type](x, M, out_features)
    assert relative_error(actual, expected) < FLOAT64
    assert relative_error(delta_weight(M, in_features, out_features, mora_type), dense) < FLOAT64
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x, M), upstream), torch.autograd.grad(expected, (x, M), upstream), strict=True
    ):
        assert relative_error(ours, theirs) < FLOAT64


@pytest.mark.parametrize("shape", SHAPES)
def test_sharing_factors_multiply_to_the_delta_weight(shape):
    M = random_square(shape, "sharing")
    A, B = sharing_factors(M, *shape[:2])
    q = M.shape[0]
    assert A.shape == (q, shape[0])
    assert B.shape == (shape[1], q)
    torch.testing.assert_close(B @ A, dense_reference(M, *shape[:2], "sharing"))


@pytest.mark.parametrize("mora_type", TYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096, 8), (4096, 11008, 8), (4096, 1024, 256)])
def test_square_size_matches_the_parameter_count_of_lora(shape, mora_type):
    in_features, out_features, r = shape
    q, root = square_size(*shape, mora_type), math.sqrt((in_features + out_features) * r)
    assert q > 0
    if mora_type == "rotation":
        assert q % 2 == 0
        assert abs(q - root) <= 1
    else:
        assert q == math.floor(root + 0.5)


def test_sharing_at_rank_256_is_1448_wide():
    assert square_size(4096, 4096, 256, "sharing") == 1448
    assert square_size(4096, 4096, 8, "rotation") == 256


def test_decoupling_with_the_identity_returns_its_input():
    x, M = torch.randn(2, 12), torch.eye(4)
    torch.testing.assert_close(OPERATORS["decoupling"](x, M, 12), x)


def test_rotation_table_is_built_once_per_size_and_usable_after_inference_mode():
    with torch.inference_mode():
        cos, sin = rotation_table(6, 5, torch.device("cpu"), torch.float32)
    assert not cos.is_inference()
    assert not sin.is_inference()
    assert rotation_table(6, 5, torch.device("cpu"), torch.float32)[0] is cos
    assert rotation_table(6, 5, torch.device("cpu"), torch.float64)[0].dtype == torch.float64
    assert rotation_table(6, 5, torch.device("meta"), torch.float32)[0].is_meta
