"""Several adapters as one LoRA: the sum of their updates, exactly or with the error that is reported; and LoRAHub."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import rounding
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peft_reslora import LoraExport, MoRAConfig, ResLoRAConfig, combine_as_lora, compose_adapters, export_lora

LLAMA = TINY_MODELS["llama"]
TARGETS = ["q_proj", "v_proj"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "reslora": lambda: ResLoRAConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "mora": lambda: MoRAConfig(r=2, mora_type="sharing", target_modules=TARGETS),
    "rotation": lambda: MoRAConfig(r=2, mora_type="rotation", target_modules=TARGETS),
    "loha": lambda: LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
}


def adapted(*configs: Any, seed: int = 3) -> Any:
    """A model with an adapter 'a', 'b', ... of each config, with random numbers."""
    model: Any = get_peft_model(LLAMA.make(), configs[0], adapter_name="a")
    for name, config in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_", "mora_", "hada_")):
            parameter.data.normal_(std=0.3)
    return model.eval()


def delta_weights(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """What merging adds to each weight, from the merge itself in float64."""
    model = model.double()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    model.set_adapter(adapter)
    model.merge_adapter([adapter])
    found = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer.weight"): parameter.detach() - before[name]
        for name, parameter in model.named_parameters()
        if name in before
    }
    model.unmerge_adapter()
    return found


def deltas_of(export: LoraExport) -> dict[str, Tensor]:
    tensors = {key.removeprefix("base_model.model."): tensor.double() for key, tensor in export.state_dict.items()}
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def assert_is_sum(export: LoraExport, parts: list[tuple[float, dict[str, Tensor]]], bound: float) -> None:
    found = deltas_of(export)
    assert {name for _, deltas in parts for name, delta in deltas.items() if delta.any()} <= found.keys()
    for name, delta in found.items():
        summed = [w * deltas[name] for w, deltas in parts if name in deltas]
        expected = sum(summed) if summed else torch.zeros_like(delta)
        assert (delta - expected).norm() <= bound * sum(float(part.norm()) for part in summed) + 1e-12, name


def test_sum_of_adapters_in_one_model_is_exact() -> None:
    model = adapted(CONFIGS["reslora"](), ResLoRAConfig(r=3, shortcut="block", pre_num=-1, target_modules=TARGETS))
    export = combine_as_lora(model, ["a", "b"], [0.7, -1.3])
    assert export.report.exact
    assert "2 adapters summed" in export.report.summary()
    parts = [(0.7, delta_weights(model, "a")), (-1.3, delta_weights(model, "b"))]
    assert_is_sum(export, parts, rounding(100))


def test_sum_of_exports_of_different_methods_is_exact() -> None:
    kinds = ("lora", "reslora", "mora", "loha")
    models = {kind: adapted(CONFIGS[kind](), seed=n) for n, kind in enumerate(kinds)}
    exports = {kind: export_lora(model, "a", fill_missing_layers=False) for kind, model in models.items()}
    weights = [1.0, -0.5, 0.25, 2.0]
    export = combine_as_lora(exports, kinds, weights)
    assert export.report.exact
    parts = [(w, delta_weights(model, "a")) for w, model in zip(weights, models.values(), strict=True)]
    assert_is_sum(export, parts, rounding(100))


def test_combination_loads_with_peft_and_computes_the_sum(tmp_path) -> None:
    model = adapted(CONFIGS["lora"](), LoraConfig(r=4, target_modules=["q_proj"]))
    combine_as_lora(model, ["a", "b"], [2.0, -1.0]).save_pretrained(tmp_path / "sum", LLAMA.make())
    parts = [(2.0, delta_weights(model, "a")), (-1.0, delta_weights(model, "b"))]
    base = LLAMA.make().double()
    loaded = PeftModel.from_pretrained(LLAMA.make().double(), str(tmp_path / "sum"))
    for weight, deltas in parts:
        for name, delta in deltas.items():
            base.get_submodule(name).weight.data += weight * delta
    inputs = LLAMA.inputs()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, base(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_truncated_sum_reports_its_whole_error() -> None:
    """Cut once, of the sum: also of an adapter that is full rank."""
    model = adapted(CONFIGS["rotation"](), CONFIGS["mora"]())
    with pytest.raises(ValueError, match="full rank"):
        combine_as_lora(model, ["a", "b"], [1.0, 1.0])
    export = combine_as_lora(model, ["a", "b"], [1.0, -2.0], rank=4)
    assert export.report.worst_error > 0.1
    found, a, b = deltas_of(export), delta_weights(model, "a"), delta_weights(model, "b")
    for layer in export.report.layers:
        expected = a[layer.layer] - 2.0 * b[layer.layer]
        error = (found[layer.layer] - expected).norm() / expected.norm()
        assert layer.rank_after == 4
        assert abs(float(error) - layer.relative_error) < 1e-5
        singular = torch.linalg.svdvals(expected)
        best = singular[4:].norm() / singular.norm()
        assert abs(float(best) - layer.relative_error) < 1e-5


def test_errors_of_exports_are_not_forgotten() -> None:
    exports = {
        "cut": export_lora(adapted(CONFIGS["rotation"]()), "a", rank=2),
        "whole": export_lora(adapted(CONFIGS["lora"]()), "a"),
    }
    report = combine_as_lora(exports, ["cut", "whole"], [1.0, 1.0]).report
    assert not report.exact
    assert "cut off in an export before" in report.summary()
    assert combine_as_lora(exports, ["whole"], [0.5]).report.exact


@pytest.mark.parametrize(
    ("adapters", "weights", "message"),
    [
        (["a"], [1.0, 2.0], "one finite number for each"),
        ([], [], "has to be one at least"),
        (["a"], [float("nan")], "one finite number for each"),
        (["a", "a"], [1.0, 1.0], "hold a name twice"),
        (["z"], [1.0], "no adapter 'z'"),
    ],
)
def test_wrong_arguments_are_refused(adapters: list[str], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine_as_lora(adapted(CONFIGS["lora"]()), adapters, weights)


def test_exports_of_different_bases_are_refused() -> None:
    exports = {"llama": export_lora(adapted(CONFIGS["lora"]()), "a")}
    other: Any = get_peft_model(TINY_MODELS["bert"].make(), LoraConfig(r=2, target_modules=["query"]))
    exports["bert"] = export_lora(other)
    exports["bert"].config.base_model_name_or_path = "another"
    with pytest.raises(ValueError, match="differ in base_model_name_or_path"):
        combine_as_lora(exports, ["llama", "bert"], [1.0, 1.0])


def _exports() -> dict[str, LoraExport]:
    kinds = ("lora", "reslora", "mora")
    return {k: export_lora(adapted(CONFIGS[k](), seed=n), "a") for n, k in enumerate(kinds)}


def test_compose_finds_the_weights_that_made_the_examples() -> None:
    """The examples are what 0.8 and -0.6 of two adapters say; the third is of no use."""
    exports, inputs, base = _exports(), LLAMA.inputs(), LLAMA.make()
    teacher = LLAMA.make()
    for weight, name in ((0.8, "lora"), (-0.6, "reslora")):
        for layer, delta in deltas_of(exports[name]).items():
            teacher.get_submodule(layer).weight.data += weight * delta.float()
    with torch.no_grad():
        wanted = teacher(**inputs).logits

    def loss(model: nn.Module) -> float:
        assert not model.training
        return float((model(**inputs).logits - wanted).square().mean().detach())

    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    result = compose_adapters(base.train(), exports, loss, l1=1e-4, budget=150, seed=1)
    assert result.loss < 0.01 * result.base_loss
    found = [result.coefficients[name] for name in ("lora", "reslora", "mora")]
    torch.testing.assert_close(torch.tensor(found), torch.tensor([0.8, -0.6, 0.0]), rtol=0, atol=0.05)
    student: Any = LLAMA.make()
    for layer, delta in deltas_of(result.export).items():
        student.get_submodule(layer).weight.data += delta.float()
    assert abs(loss(student) - result.loss) < 1e-4
    assert base.training
    assert all(p.requires_grad and p.equal(before[name]) for name, p in base.named_parameters())
    assert not hasattr(base, "peft_config")


def test_compose_is_repeatable_and_keeps_to_its_bounds() -> None:
    exports, inputs = _exports(), LLAMA.inputs()
    inputs["labels"] = inputs["input_ids"]
    runs = [
        compose_adapters(
            LLAMA.make(), exports, lambda m: float(m(**inputs).loss), bounds=(-0.2, 0.3), budget=8, seed=5
        )
        for _ in range(2)
    ]
    assert runs[0].coefficients == runs[1].coefficients
    assert all(-0.2 <= weight <= 0.3 for weight in runs[0].coefficients.values())
    assert runs[0].loss <= runs[0].base_loss


def test_compose_with_a_strong_penalty_takes_no_adapter() -> None:
    exports, inputs = _exports(), LLAMA.inputs()
    inputs["labels"] = inputs["input_ids"]
    result = compose_adapters(LLAMA.make(), exports, lambda m: float(m(**inputs).loss), l1=1e6, budget=4)
    assert set(result.coefficients.values()) == {0.0}
    assert not any(delta.any() for delta in deltas_of(result.export).values())


def test_compose_refuses_what_it_cannot_search() -> None:
    exports = _exports()
    with pytest.raises(ValueError, match="has an adapter already"):
        compose_adapters(adapted(CONFIGS["lora"]()), exports, lambda m: 0.0)
    with pytest.raises(ValueError, match="loss of the base model is nan"):
        compose_adapters(base := LLAMA.make(), exports, lambda m: float("nan"))
    assert not any("lora" in name for name, _ in base.named_parameters())
    with pytest.raises(ValueError, match="enclose 0"):
        compose_adapters(LLAMA.make(), exports, lambda m: 0.0, bounds=(0.5, 1.0))
    with pytest.raises(ValueError, match="budget=0"):
        compose_adapters(LLAMA.make(), exports, lambda m: 0.0, budget=0)
