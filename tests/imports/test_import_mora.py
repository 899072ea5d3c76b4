"""Checkpoints in the format of kongds/MoRA: what is imported computes what their description says, or is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TINY_MODELS
from helpers.tolerances import MODEL64
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_reslora.imports import import_adapter
from peft_reslora.mora.operators import OPERATORS

LLAMA = TINY_MODELS["llama"]
GPT2 = TINY_MODELS["gpt2"]


def their_size(in_features: int, out_features: int, r: int, mora_type: int) -> int:
    """The rounded root of (in + out) r; of type 6 without its last bit."""
    q = int(math.sqrt((in_features + out_features) * r) + 0.5)
    return q - q % 2 if mora_type == 6 else q


def their_update(x: Tensor, M: Tensor, out_features: int, mora_type: int) -> Tensor:
    """One input vector through their operator, number by number, from the words in `imports/mora.py`."""
    in_features, q = x.shape[0], M.shape[0]
    groups = math.ceil(in_features / q)
    padded = torch.stack([x[p % in_features] for p in range(groups * q)])
    if mora_type == 6:
        out = []
        for g in range(groups):
            turned = torch.zeros(q, dtype=x.dtype)
            for j in range(q // 2):
                angle = g / 10000 ** (2 * j / q)
                a, b = padded[g * q + j], padded[g * q + j + q // 2]
                turned[j] = a * math.cos(angle) - b * math.sin(angle)
                turned[j + q // 2] = b * math.cos(angle) + a * math.sin(angle)
            out.append(M @ turned)
        flat = torch.cat(out)
        return torch.stack([flat[p % len(flat)] for p in range(out_features)])
    if mora_type in (1, 4):
        h = torch.stack([padded[i::q].sum() for i in range(q)])
    else:
        h = torch.stack([x[a:b].sum() for a, b in _runs(in_features, q)])
    y = M @ h
    if mora_type in (1, 3):
        return torch.stack([y[p % q] for p in range(out_features)])
    result = torch.zeros(out_features, dtype=x.dtype)
    for i, (a, b) in enumerate(_runs(out_features, q)):
        result[a:b] = y[i]
    return result


def _runs(length: int, q: int) -> list[tuple[int, int]]:
    """`length` cut into q runs of neighbors, the longer ones first."""
    sizes = [length // q + (i < length % q) for i in range(q)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def shape_of(layer: nn.Module) -> tuple[int, int]:
    weight = layer.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(layer, nn.Linear) else tuple(weight.shape)


def write_theirs(folder: Path, model: nn.Module, mora_type: int, r: int, targets: list[str], **fields: Any) -> dict:
    """A folder as their PEFT fork saves it; returns the matrices by layer."""
    base = folder.parent / "base"
    model.save_pretrained(base)
    folder.mkdir()
    torch.manual_seed(1)
    matrices = {}
    for name, layer in model.named_modules():
        if name.split(".")[-1] in targets:
            q = their_size(*shape_of(layer), r, mora_type)
            matrices[name] = torch.randn(q, q, dtype=torch.float32) / q
    keys = ((f"base_model.model.{n}.lora_{part}.weight", M) for n, M in matrices.items() for part in "AB")
    save_file({key: M.clone() for key, M in keys}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": None,
        "use_mora": True,
        "mora_type": mora_type,
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return matrices


@torch.no_grad()
def their_logits(model: nn.Module, matrices: dict, mora_type: int, inputs: dict) -> Tensor:
    """The base model with their update added to each layer's output."""

    def hook(M: Tensor):
        def add(layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
            rows = args[0].reshape(-1, args[0].shape[-1])
            added = torch.stack([their_update(row, M.double(), output.shape[-1], mora_type) for row in rows])
            return output + added.view(output.shape)

        return add

    hooks = [model.get_submodule(name).register_forward_hook(hook(M)) for name, M in matrices.items()]
    logits = model(**inputs).logits
    for handle in hooks:
        handle.remove()
    return logits


@torch.no_grad()
def imported_logits(model: nn.Module, folder: Path, inputs: dict) -> Tensor:
    loaded = PeftModel.from_pretrained(model, str(folder)).double().eval()
    return loaded(**inputs).logits


@pytest.mark.parametrize(
    ("mora_type", "r", "targets"),
    [
        (1, 2, ["q_proj", "v_proj", "gate_proj", "down_proj"]),
        (6, 2, ["q_proj", "v_proj"]),
        (6, 5, ["q_proj", "v_proj"]),
    ],
)
def test_import_computes_their_forward(tmp_path: Path, mora_type: int, r: int, targets: list[str]) -> None:
    model = LLAMA.make().double()
    inputs = LLAMA.inputs()
    matrices = write_theirs(tmp_path / "theirs", model, mora_type, r, targets)
    account = import_adapter(tmp_path / "theirs", tmp_path / "ours")
    expected = their_logits(model, matrices, mora_type, inputs)
    assert (expected - model(**inputs).logits).abs().max() > 0.1
    torch.testing.assert_close(imported_logits(model, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64)
    assert account.layers == len(matrices)
    assert ("rank_pattern" in str(account)) == (r == 5)  # there theirs rounds to another even number than ours


def test_import_of_conv1d_computes_their_forward(tmp_path: Path) -> None:
    model, inputs = GPT2.make().double(), GPT2.inputs()
    matrices = write_theirs(tmp_path / "theirs", model, 1, 2, ["c_attn"], fan_in_fan_out=True)
    import_adapter(tmp_path / "theirs", tmp_path / "ours")
    expected = their_logits(model, matrices, 1, inputs)
    torch.testing.assert_close(imported_logits(model, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (12, 12), (9, 30), (30, 9), (6, 6)])
@pytest.mark.parametrize(("theirs", "ours"), [(1, "sharing"), (6, "rotation")])
@pytest.mark.parametrize("q", [4, 6, 8])
def test_types_1_and_6_are_sharing_and_rotation(shape: tuple[int, int], theirs: int, ours: str, q: int) -> None:
    torch.manual_seed(0)
    x, M = torch.randn(shape[0], dtype=torch.float64), torch.randn(q, q, dtype=torch.float64)
    torch.testing.assert_close(OPERATORS[ours](x, M, shape[1]), their_update(x, M, shape[1], theirs))


@pytest.mark.parametrize("mora_type", [2, 3, 4])
def test_types_2_to_4_are_no_operator_of_ours(mora_type: int) -> None:
    torch.manual_seed(0)
    x, M = torch.randn(12, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    expected = their_update(x, M, 12, mora_type)
    assert all(not torch.allclose(operator(x, M, 12), expected) for operator in OPERATORS.values())


@pytest.mark.parametrize("mora_type", [2, 3, 4])
def test_types_2_to_4_are_refused_where_they_mix_neighbors(tmp_path: Path, mora_type: int) -> None:
    write_theirs(tmp_path / "theirs", LLAMA.make(), mora_type, 2, ["q_proj"])
    with pytest.raises(ValueError, match=f"mora_type={mora_type} has no equal here: on layer .* neighbour"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("mora_type", [2, 3, 4])
def test_types_2_to_4_are_imported_where_no_neighbors_mix(tmp_path: Path, mora_type: int) -> None:
    model, inputs = LLAMA.make().double(), LLAMA.inputs()
    matrices = write_theirs(tmp_path / "theirs", model, mora_type, 20, ["q_proj"])  # a square of 31 for 24 -> 24
    account = import_adapter(tmp_path / "theirs", tmp_path / "ours")
    assert ("columns that no input reaches" in str(account)) == (mora_type in (2, 3))
    expected = their_logits(model, matrices, mora_type, inputs)
    torch.testing.assert_close(imported_logits(model, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64)


def test_modules_to_save_are_kept(tmp_path: Path) -> None:
    model, inputs = LLAMA.make().double(), LLAMA.inputs()
    matrices = write_theirs(tmp_path / "theirs", model, 1, 2, ["q_proj"], modules_to_save=["lm_head"])
    head = torch.randn(53, 24)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    keys = ((f"base_model.model.{n}.lora_{part}.weight", M) for n, M in matrices.items() for part in "AB")
    save_file({key: M.clone() for key, M in keys} | {"base_model.model.lm_head.weight": head}, file)
    import_adapter(tmp_path / "theirs", tmp_path / "ours")
    trained = LLAMA.make().double()
    trained.lm_head.weight.data = head.double()
    expected = their_logits(trained, matrices, 1, inputs)
    torch.testing.assert_close(imported_logits(model, tmp_path / "ours", inputs), expected, rtol=MODEL64, atol=MODEL64)


def test_torch_files_are_read_and_no_other_pickles(tmp_path: Path) -> None:
    model = LLAMA.make()
    matrices = write_theirs(tmp_path / "theirs", model, 1, 2, ["q_proj"])
    (tmp_path / "theirs" / "adapter_model.safetensors").unlink()
    file = tmp_path / "theirs" / "adapter_model.bin"
    torch.save({f"base_model.model.{n}.lora_A.weight": nn.Parameter(M) for n, M in matrices.items()}, file)
    assert import_adapter(tmp_path / "theirs", tmp_path / "ours").layers == 4
    torch.save({"model": model}, file)
    with pytest.raises(ValueError, match="more than tensors"):
        import_adapter(tmp_path / "theirs", tmp_path / "other")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mora_type": 5}, "mora_type=5 computes nothing"),
        ({"mora_type": "6"}, "no integer"),
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 3}, "do not belong together"),
        ({"base_model_name_or_path": None}, "do not say which base model"),
        ({"base_model_name_or_path": "nowhere"}, "no config of the base model 'nowhere'"),
        ({"target_modules": ["k_proj"]}, "does not fit"),
        ({"target_modules": ["q_proj", "k_proj"]}, "missing"),
        ({"rank_pattern": {"layers.[0-9]+.x": 4}}, "regular expressions"),
        ({"use_mora": False}, "Adapters of PEFT need no import"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    write_theirs(tmp_path / "theirs", LLAMA.make(), 1, 2, ["q_proj"])
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        import_adapter(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_squares_that_ours_rounds_elsewhere_are_refused(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", LLAMA.make(), 6, 2, ["gate_proj"])  # 11.3: theirs 10, ours 12
    with pytest.raises(ValueError, match="rounds down to an even number; ours is 12 for r=2"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours")


def test_other_numbers_in_the_second_name_are_refused(tmp_path: Path) -> None:
    matrices = write_theirs(tmp_path / "theirs", LLAMA.make(), 1, 2, ["q_proj"])
    keys = ((f"base_model.model.{n}.lora_{part}.weight", M, part) for n, M in matrices.items() for part in "AB")
    tensors = {key: M.clone() if part == "A" else -M for key, M, part in keys}
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="which are one matrix"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours")


def test_restarted_runs_are_refused(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", LLAMA.make(), 1, 2, ["q_proj"])
    (tmp_path / "base-model").mkdir()
    with pytest.raises(ValueError, match="ReMoRA"):
        import_adapter(tmp_path / "theirs", tmp_path / "ours")


def test_a_filled_folder_is_not_replaced(tmp_path: Path) -> None:
    write_theirs(tmp_path / "theirs", LLAMA.make(), 1, 2, ["q_proj"])
    with pytest.raises(ValueError, match="would be replaced"):
        import_adapter(tmp_path / "theirs", tmp_path / "theirs")
