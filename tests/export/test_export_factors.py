"""Factors, truncation and errors of the export against dense oracles; names of modules against PEFT's matching."""

from __future__ import annotations

import pytest
import torch
from helpers.tolerances import FLOAT64
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_reslora.export.factors import Factors, KroneckerFactors, factorize
from peft_reslora.export.fitting import RANKS, Fit, relative_error, truncate
from peft_reslora.export.targets import linear_shape, missing_partners, module_type, named_base_modules, target_names


def random_factors(out_features: int, in_features: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    return Factors(A, torch.randn(out_features, rank, generator=generator, dtype=torch.float64))


def kronecker() -> KroneckerFactors:
    return KroneckerFactors.product(random_factors(3, 5, 2), random_factors(7, 4, 3, seed=1))


UPDATES = {
    "low": random_factors(23, 17, 6),
    "wide": random_factors(9, 40, 9),
    "dependent": Factors(torch.cat((a := random_factors(23, 17, 3)).A.repeat(2, 1).split(1)), a.B.repeat(1, 2)),
    "kronecker": kronecker(),
}


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_truncation_is_the_dense_svds(name: str, rank: int) -> None:
    factors = UPDATES[name]
    update = factors.B @ factors.A
    U, S, Vh = torch.linalg.svd(update.double())
    cut = truncate(factors, rank=rank)
    assert cut.factors.rank == rank
    torch.testing.assert_close(
        (cut.factors.B @ cut.factors.A).double(), U[:, :rank] * S[:rank] @ Vh[:rank], rtol=FLOAT64, atol=FLOAT64
    )
    assert cut.relative_error == pytest.approx(float(S[rank:].norm() / S.norm()), abs=FLOAT64)
    assert cut.energy_kept == pytest.approx(float(S[:rank].square().sum() / S.square().sum()), abs=FLOAT64)
    assert relative_error(factors, cut.factors) == pytest.approx(cut.relative_error, abs=FLOAT64)


@given(st.floats(min_value=1e-3, max_value=1.0), st.integers(min_value=0, max_value=5))
@settings(max_examples=50, deadline=None)
def test_energy_keeps_the_fewest_directions_that_reach_it(energy: float, seed: int) -> None:
    factors = random_factors(11, 13, 7, seed)
    squares = torch.linalg.svdvals((factors.B @ factors.A).double()).square()
    cut = truncate(factors, energy=energy)
    assert energy - FLOAT64 <= cut.energy_kept <= 1
    fewer = squares[: cut.factors.rank - 1].sum() / squares.sum()
    assert float(fewer) < energy + FLOAT64


def test_all_energy_is_kept_to_rounding() -> None:
    cut = truncate(UPDATES["low"], energy=1.0)
    assert relative_error(UPDATES["low"], cut.factors) < FLOAT64


def test_singular_values_are_split_evenly() -> None:
    cut = truncate(UPDATES["low"], rank=3).factors
    torch.testing.assert_close(cut.A @ cut.A.T, cut.B.T @ cut.B, rtol=FLOAT64, atol=FLOAT64)


def test_factors_of_at_most_the_rank_are_not_touched() -> None:
    assert truncate(UPDATES["low"], rank=6).factors is UPDATES["low"]


def test_truncate_wants_one_of_rank_and_energy() -> None:
    with pytest.raises(ValueError, match="one of rank and energy"):
        truncate(UPDATES["low"])
    with pytest.raises(ValueError, match="not both"):
        truncate(UPDATES["low"], rank=1, energy=0.5)


def test_a_kronecker_product_is_torchs() -> None:
    factors = kronecker()
    dense = torch.kron(factors.left.B @ factors.left.A, factors.right.B @ factors.right.A)
    torch.testing.assert_close(factors.B @ factors.A, dense)
    spectrum = factors.spectrum()
    torch.testing.assert_close(spectrum.U * spectrum.S @ spectrum.Vh, dense)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (4, 4)])
def test_a_full_matrix_is_factorized_on_its_smaller_side(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    A, B = factorize(matrix)
    assert A.shape[0] == min(shape)
    assert torch.equal(B @ A, matrix)


def test_unused_directions_are_dropped_and_scale_goes_into_b() -> None:
    A, B = torch.randn(4, 9), torch.randn(6, 4)
    A[1], B[:, 2] = 0, 0
    factors = Factors.of(A, B, 3.0)
    assert factors.rank == 2
    torch.testing.assert_close(factors.B @ factors.A, 3 * B @ A)


def test_more_directions_than_the_smaller_side_are_brought_down() -> None:
    factors = random_factors(5, 30, 12)
    assert Factors.of(factors.A, factors.B).rank == 5
    assert relative_error(factors, Factors.of(factors.A, factors.B)) < FLOAT64


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(5, 2\) instead of \(r, in_features\)"):
        Factors.of(torch.ones(3, 4), torch.ones(5, 2))
    with pytest.raises(ValueError, match="gather its parameters"):
        Factors.of(torch.ones(0), torch.ones(0))


def test_an_error_below_float32_is_measured() -> None:
    factors = UPDATES["low"]
    assert relative_error(factors, factors) < FLOAT64
    nudged = Factors(factors.A * (1 + 1e-6), factors.B)
    assert relative_error(factors, nudged) == pytest.approx(1e-6, rel=0.1)
    empty = Factors(torch.zeros(0, 4), torch.zeros(5, 0))
    assert relative_error(empty, empty) == 0.0
    assert relative_error(empty, random_factors(5, 4, 1)) == float("inf")


def test_file_ranks_stop_at_the_largest_that_is_served() -> None:
    assert Fit().update(random_factors(600, 600, 512)).factors.rank == RANKS[-1]
    with pytest.raises(ValueError, match="rank 513"):
        Fit().update(random_factors(600, 600, 513))
    assert Fit(energy=1e-6).update(random_factors(600, 600, 513)).factors.rank == 1


# Names


def matched(targets: list[str], names: list[str]) -> set[str]:
    config = LoraConfig(target_modules=targets)
    return {name for name in names if check_target_module_exists(config, name)}


NAMES = [
    *(f"model.layers.{i}.attn.{name}" for i in range(12) for name in ("q_proj", "v_proj", "o_proj")),
    *(f"vision.layers.{i}.attn.q_proj" for i in range(2)),
    *(f"model.layers.{i}" for i in range(12)),
    *(f"unet.blocks.{i}.to_out.{j}" for i in range(2) for j in range(2)),
    *(f"unet.blocks.{i}.to_out" for i in range(2)),
    "lm_head",
    "my_q_proj",
]


@pytest.mark.parametrize(
    ("exported", "targets"),
    [
        ([n for n in NAMES if n.endswith(".v_proj")], ["v_proj"]),
        ([n for n in NAMES if n.endswith(".q_proj")], ["q_proj"]),
        (["vision.layers.0.attn.q_proj", "vision.layers.1.attn.q_proj"], None),
        (["model.layers.1.attn.v_proj"], None),
        (["unet.blocks.0.to_out.0", "unet.blocks.1.to_out.0"], ["to_out.0"]),
        (["unet.blocks.1.to_out.0"], None),
        (["lm_head", "my_q_proj"], ["lm_head", "my_q_proj"]),
        ([n for n in NAMES if "model" in n and n.endswith(".o_proj")] + ["lm_head"], ["lm_head", "o_proj"]),
    ],
)
def test_targets_are_suffixes_only_where_they_name_no_other_module(exported: list[str], targets: list | None) -> None:
    found = target_names(exported, NAMES)
    assert found == (targets or sorted(exported))
    assert matched(found, NAMES) == set(exported)


@given(st.sets(st.sampled_from(NAMES), min_size=1))
@settings(max_examples=100, deadline=None)
def test_targets_match_what_is_exported(exported: set[str]) -> None:
    assert matched(target_names(exported, NAMES), NAMES) == exported


def test_module_types_differ_in_block_indices_only() -> None:
    assert module_type("layers.3.experts.11.up_proj") == "layers.*.experts.*.up_proj"
    assert module_type("blocks.0.to_out.0") == "blocks.*.to_out.0"


def test_missing_partners_are_linear_layers_of_the_same_type() -> None:
    modules: dict[str, nn.Module] = {
        f"layers.{i}.{name}": nn.Linear(2, 3) for i in range(3) for name in ("q_proj", "v_proj")
    }
    modules["layers.3.q_proj"] = nn.Identity()
    assert missing_partners(["layers.1.q_proj"], modules) == [
        "layers.0.q_proj",
        "layers.0.v_proj",
        "layers.1.v_proj",
        "layers.2.q_proj",
        "layers.2.v_proj",
    ]
    assert missing_partners(["layers.1.v_proj"], modules) == ["layers.0.v_proj", "layers.2.v_proj"]
    assert linear_shape(modules["layers.0.q_proj"]) == (2, 3)


def test_base_modules_are_those_of_named_modules() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Tanh()), "b": nn.ModuleDict({"c": shared})})
    assert list(named_base_modules(model)) == [name for name, _ in model.named_modules()]
