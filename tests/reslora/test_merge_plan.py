"""A merge is one value: whoever merges, exports or reports reads the same plan, made once from all layers."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, narrow_llama
from helpers.tolerances import rounding
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_reslora import ResLoRAConfig, export_lora, export_lora_from_files, merge_report, save_as_lora
from peft_reslora.reslora.layer import ResLoRALayer
from peft_reslora.reslora.linked_chain import Chain
from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.merging.anneal import anneal_shortcuts
from peft_reslora.reslora.merging.estimators import norm_of_sum
from peft_reslora.reslora.merging.plan import merges_from_state_dict

TINY = TINY_MODELS["llama"]


def adapted(shortcut: str, targets: list[str] | None = None, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = ResLoRAConfig(r=2, target_modules=targets or ["q_proj", "v_proj"], shortcut=shortcut, **fields)
    model = randomize_adapters(get_peft_model(TINY.make(), config)).train()
    model(**TINY.inputs())
    return model.eval()


def batches() -> list[dict[str, Any]]:
    return [TINY.inputs() for _ in range(4)]


REASONS = {
    ("block", None): {"its updates are fixed matrices"},
    ("input", None): {"first of its chain", "estimated by input_norm"},
    ("middle", 0.5): {"first of its chain", "estimated by input_norm"},
    ("middle", 1.0): {"first of its chain", "annealed"},
}


@pytest.mark.parametrize(("shortcut", "share"), REASONS)
def test_all_say_whether_a_merge_is_exact_and_why(
    shortcut: str, share: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, reasons = adapted(shortcut), REASONS[shortcut, share]
    if share is not None:
        anneal_shortcuts(model, share)
    exact = not any("estimated" in reason for reason in reasons)
    planned = [entry for chain in chains_of(model, "default") for entry in chain.merge().exactness]
    assert {entry.why for entry in planned} == reasons
    assert all(entry.exact == ("estimated" not in entry.why) for entry in planned)
    report = merge_report(model, batches(), estimators="input_norm")
    assert report.exact == exact
    assert all(reason in str(report) for reason in reasons if exact)
    model.save_pretrained(tmp_path / "native")
    for way, export in (("model", export_lora(model)), ("files", export_lora_from_files(tmp_path / "native"))):
        assert {row.why or row.merge for row in export.report.layers} == reasons
        assert export.report.exact == exact
        export.save_pretrained(tmp_path / way)
        card = (tmp_path / way / "README.md").read_text(encoding="utf-8")
        assert all(reason.replace("_", "") in card.replace("\\", "").replace("_", "") for reason in reasons)
        assert ("exact up to rounding" in card) == exact
    with caplog.at_level(logging.INFO):
        model.merge_and_unload()
    assert ("exactly" in caplog.text) == exact


@pytest.mark.filterwarnings("ignore:Adapter 'default' has no shortcut at all")
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_the_card_of_a_lone_layer_says_exact(shortcut: str, tmp_path: Path) -> None:
    model = adapted(shortcut, ["lm_head"])
    save_as_lora(tmp_path, model)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "exact up to rounding" in card
    assert "exact (first of its chain)" in card
    assert "estimated" not in card


def test_the_plan_of_the_files_is_that_of_the_model(tmp_path: Path) -> None:
    model = adapted("middle", pre_num=-1)
    model.save_pretrained(tmp_path)
    saved = merges_from_state_dict(model.peft_config["default"], load_file(tmp_path / "adapter_model.safetensors"))
    for chain in chains_of(model, "default"):
        merge = chain.merge()
        for position, name in enumerate(chain.names):
            other, place = saved[name]
            assert place == position
            assert other.exactness == merge.exactness
            assert list(other.coefficients[place]) == pytest.approx(merge.coefficients[position])
            (A, B), (own_a, own_b) = other.factors(place), merge.factors(position)
            assert relative_error(B @ A, own_b @ own_a) < rounding(A.shape[1])


WAYS: dict[str, Callable[[PeftModel], Any]] = {
    "merge": lambda model: model.merge_adapter(),
    "merge and unload": lambda model: model.merge_and_unload(),
    "merge safely": lambda model: model.merge_adapter(safe_merge=True),
    "export": export_lora,
    "report": lambda model: merge_report(model, batches()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_one_merge_reads_each_base_weight_once(shortcut: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(shortcut, merge_estimator="weight_norm")
    reads: Counter[int] = Counter()
    read = ResLoRALayer.unmerged_base_weight

    def counted(self: ResLoRALayer) -> torch.Tensor:
        reads[id(self)] += 1
        return read(self)

    monkeypatch.setattr(ResLoRALayer, "unmerged_base_weight", counted)
    chains = chains_of(model, "default")
    WAYS[way](model)
    assert len(reads) == sum(len(chain) - 1 for chain in chains)  # that of a chain's last layer stands for nothing
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_reads_of_base_weights_grow_with_the_depth_no_faster_than_the_layers(
    shortcut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of weight_norm read them once per pair of layers. Counted where the weight itself is read."""
    reads: list[int] = []
    read = ResLoRALayer._base_weight
    monkeypatch.setattr(ResLoRALayer, "_base_weight", lambda layer: reads.append(id(layer)) or read(layer))
    for layers in (4, 8, 16):
        reads.clear()
        fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        config = ResLoRAConfig(shortcut=shortcut, merge_estimator="weight_norm", **fields)
        export_lora(get_peft_model(narrow_llama(layers), config))
        assert len(reads) == len(set(reads)) == 2 * (layers - 1)


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "dtype"),
    [(7, 5, 3, torch.float32), (300, 2100, 4, torch.bfloat16), (1500, 1100, 2, torch.float32)],  # of one part and more
)
def test_the_norm_of_a_sum_is_that_of_the_sum(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    W, A, B = torch.randn(rows, columns, dtype=dtype), torch.randn(rank, columns), torch.randn(rows, rank)
    expected = float((W.double() + B.double() @ A.double()).norm())
    # Three sums over rows, columns and rank, whose parts are at most (||W|| + ||B A||)^2 in all.
    parts = float(W.double().norm() + (B.double() @ A.double()).norm()) ** 2 / expected**2
    assert norm_of_sum(W, A, B) == pytest.approx(expected, rel=parts * rounding(rows + columns + rank))


@pytest.mark.parametrize("left", [0.0, 1e-3])
def test_the_norm_of_a_sum_in_which_both_parts_cancel(left: float) -> None:
    torch.manual_seed(0)
    A, B, rest = torch.eye(6), torch.randn(9, 6), torch.randn(9, 6)
    W = left * rest - B
    expected = float((W.double() + B.double()).norm())
    assert norm_of_sum(W, A, B) == pytest.approx(expected, rel=rounding(6 * 9))


def test_the_norm_of_a_sum_that_is_no_number_is_none() -> None:
    W = torch.tensor([[1.0, math.nan]])
    assert math.isnan(norm_of_sum(W, torch.ones(1, 2), torch.ones(1, 1)))
    assert norm_of_sum(torch.tensor([[math.inf]]), torch.ones(1, 1), torch.ones(1, 1)) == pytest.approx(math.inf)


@pytest.mark.parametrize("way", ["export", "merge and unload"])
def test_one_merge_plans_each_chain_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: Counter[int] = Counter()
    merge = Chain.merge

    def counted(self: Chain) -> Any:
        plans[id(self)] += self.planned is None
        return merge(self)

    model = adapted("middle", merge_estimator="weight_norm")
    chains = chains_of(model, "default")
    monkeypatch.setattr(Chain, "merge", counted)
    WAYS[way](model)
    assert len(plans) == len(chains)
    assert set(plans.values()) == {1}
