"""MoRA on convolutions: the operator on each patch, its merge, its files and its exports."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import tuner_layers
from helpers.convolutions import CASES, Net, images, net
from helpers.gradients import assert_gradients_close
from helpers.mora import TYPES, dense_reference, reference
from helpers.oracle import relative_error
from helpers.tolerances import EPS, FLOAT64, MODEL64, half_rounding
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_reslora import MoRAConfig, export_lora, save_as_lora
from peft_reslora.export import export_lora_from_files
from peft_reslora.mora import layer_sizes
from peft_reslora.mora.operators import OPERATORS

pytestmark = pytest.mark.usefixtures("float64")
IN_ONE_GROUP = [name for name, case in CASES.items() if dict(case.options).get("groups", 1) == 1]
IN_PEFT = [name for name in IN_ONE_GROUP if name not in ("dilation", "padded in a circle")]
every_type = pytest.mark.parametrize("mora_type", TYPES)


def adapted(base: nn.Module, mora_type: str, r: int = 2, **fields: Any) -> PeftModel:
    fields = {"target_modules": ["up", "down", "step"], **fields}
    model = get_peft_model(copy.deepcopy(base), MoRAConfig(r=r, mora_type=mora_type, **fields))
    generator = torch.Generator().manual_seed(2)
    for layer in tuner_layers(model).values():
        M = layer.mora_M["default"]
        M.data = torch.randn(M.shape, generator=generator) / len(M)
    return model.eval()


def dense(model: PeftModel) -> dict[str, torch.Tensor]:
    """The kernel of each layer, by the operator's matrix, column by column."""
    kernels = {}
    for name, layer in tuner_layers(model).items():
        weight, M = layer.get_base_layer().weight, layer.mora_M["default"]
        matrix = dense_reference(M, weight[0].numel(), len(weight), layer.mora_type["default"])
        kernels[f"{name}.weight"] = weight.detach() + matrix.reshape(weight.shape)
    return kernels


@every_type
def test_it_is_the_operator_on_each_patch(mora_type):
    """Of 2 x 4 x 5 positions, with steps of 2 and an uneven kernel, patch by patch."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 7, (3, 2), stride=2))
    model, x = adapted(base, mora_type, target_modules=["0"]), torch.randn(2, 3, 9, 10)
    M = model.base_model.model[0].mora_M["default"]
    expected = base(x).detach()
    for n, i, j in itertools.product(range(2), range(4), range(5)):
        patch = x[n, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 2].flatten()
        expected[n, :, i, j] += reference(patch, M.detach(), 7, mora_type)
    assert relative_error(model(x), expected) < FLOAT64
    assert len(M) in (round((2 * (18 + 7)) ** 0.5), 8)  # as many numbers as a LoRA of rank 2 on kernels has


@pytest.mark.quick(case=["2d"])
@pytest.mark.quick(case=["1d", "3d"], mora_type=["rotation"])
@pytest.mark.parametrize("case", IN_ONE_GROUP)
@every_type
def test_output_gradients_and_merges_are_those_of_the_dense_kernel(case, mora_type):
    base, x = net(case), images(case).requires_grad_()
    model = adapted(base, mora_type)
    expected, found = torch.func.functional_call(base, dense(model), (x,)), model(x)
    assert relative_error(found, expected) < FLOAT64
    assert relative_error(found, base(x)) > 0.01
    leaves = {n: layer.mora_M["default"] for n, layer in tuner_layers(model).items()} | {"x": x}
    grads, wanted = (torch.autograd.grad(y.square().sum(), list(leaves.values())) for y in (found, expected))
    assert_gradients_close(dict(zip(leaves, grads, strict=True)), dict(zip(leaves, wanted, strict=True)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert relative_error(model(x), expected) < FLOAT64
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = model.merge_and_unload(safe_merge=True)
    assert relative_error(merged(x), expected) < FLOAT64
    assert {type(module) for module in merged.modules()} == {type(module) for module in base.modules()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_too(reentrant):
    model, x = adapted(net("2d"), "rotation"), images("2d").requires_grad_()
    leaves = {n: layer.mora_M["default"] for n, layer in tuner_layers(model).items()}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return {n: M.grad.clone() for n, M in leaves.items()}

    wanted = gradients()
    model.get_base_model().reentrant = reentrant
    assert_gradients_close(gradients(), wanted)


@pytest.mark.quick(mora_type=["rotation"])
@every_type
def test_it_starts_at_the_base_and_is_saved_and_loaded(mora_type, tmp_path):
    base, x = net("1d"), images("1d")
    new = get_peft_model(copy.deepcopy(base), MoRAConfig(r=2, mora_type=mora_type, target_modules=["up", "down"]))
    assert torch.equal(new(x), base(x))
    model = adapted(base, mora_type)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()
        assert torch.equal(loaded(x), model(x))
    for layer in tuner_layers(model).values():
        layer.set_scale("default", 0.5)
    half = model(x)
    assert relative_error(model.merge_and_unload()(x), half) < FLOAT64


def test_two_adapters_and_a_model_without_a_tuner():
    base, x = net("2d"), images("2d")
    model = adapted(base, "sharing")
    model.add_adapter("second", MoRAConfig(r=3, mora_type="rotation", target_modules=["up"], init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    model.base_model.set_adapter(["second"])
    second = model(x)
    assert relative_error(both, second) > 0.01
    model.base_model.set_adapter(["default", "second"])
    assert relative_error(model.merge_and_unload(adapter_names=["default", "second"])(x), both) < FLOAT64
    config = MoRAConfig(r=2, mora_type="sharing", target_modules=["up"])
    assert torch.equal(inject_adapter_in_model(config, copy.deepcopy(base))(x), base(x))


@pytest.mark.quick(dtype=[torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    model, x = adapted(net("2d"), "rotation"), images("2d")
    expected, bound = model(x), half_rounding(60, dtype)
    with torch.autocast("cpu", dtype):
        assert relative_error(model.float()(x.float()).double(), expected) < bound
    assert relative_error(model.to(dtype)(x.to(dtype)).double(), expected) < bound


def test_sizes_are_those_of_a_lora_on_kernels():
    size = layer_sizes(adapted(net("2d"), "sharing"))[0]
    assert (size.in_features, size.out_features) == (6 * 9, 8)
    assert size.lora_parameters == 2 * (6 * 9 + 8)


@pytest.mark.quick(case=["2d"])
@pytest.mark.filterwarnings("ignore:The LoRA has r=", "ignore:.*of its update")
@pytest.mark.parametrize("case", IN_PEFT)
def test_the_export_of_sharing_is_exact_in_plain_peft(case, tmp_path):
    base, x = net(case), images(case)
    model = adapted(base, "sharing")
    export = save_as_lora(tmp_path, model, base_model=copy.deepcopy(base).float())
    assert relative_error(PeftModel.from_pretrained(base, tmp_path).double()(x), model(x)) < 20 * EPS
    assert all(layer.exact for layer in export.report.layers)


@pytest.mark.filterwarnings("ignore:The LoRA has r=")
def test_other_types_are_exported_truncated_and_what_peft_misreads_is_refused():
    model = adapted(net("2d"), "rotation")
    with pytest.raises(ValueError, match=r"'layers\.0\.up'.*mora_type='rotation'.*full rank"):
        export_lora(model)
    export = export_lora(model, rank=3)
    for name, layer in tuner_layers(model).items():
        A, B = (export.state_dict[f"base_model.model.{name}.lora_{f}.weight"].double() for f in "AB")
        U, S, V = torch.linalg.svd(layer.get_delta_weight("default").flatten(1), full_matrices=False)
        best = (U[:, :3] * S[:3]) @ V[:3]
        assert relative_error(B.flatten(1) @ A.flatten(1), best) < 100 * EPS
    with pytest.raises(ValueError, match=r"'layers\.0\.up': .*which PEFT's LoRA ignores.*merge_and_unload"):
        export_lora(adapted(net("dilation"), "sharing"))


@pytest.mark.filterwarnings("ignore:The LoRA has r=", "ignore:.*local path")
@pytest.mark.parametrize(("mora_type", "options"), [("sharing", {}), ("rotation", {"rank": 2})])
def test_from_files_it_is_the_same(mora_type, options, tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2], "layer_type": "basic", "num_labels": 3}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(tmp_path / "base")
    base = ResNetForImageClassification.from_pretrained(tmp_path / "base").double()
    model = adapted(base, mora_type, target_modules=["convolution"])
    model.save_pretrained(tmp_path / "own")
    exported, expected = export_lora_from_files(tmp_path / "own", **options), export_lora(model, **options)
    assert exported.state_dict.keys() == expected.state_dict.keys()
    for key, tensor in exported.state_dict.items():
        assert relative_error(tensor, expected.state_dict[key]) < 100 * EPS, key


@pytest.mark.quick(mora_type=["rotation"])
@every_type
def test_a_unet_of_diffusers_computes_with_the_operator_on_patches(mora_type):
    """All of its linear layers and convolutions; output, all gradients, and the merged model."""
    diffusers_models = pytest.importorskip("helpers.diffusers_models")
    base = diffusers_models.build("UNet2DConditionModel").double().eval()
    targets = diffusers_models.targets_of("UNet2DConditionModel" + diffusers_models.CONVOLVED, base)
    inputs = next(diffusers_models.inputs_of(base))
    model = adapted(base, mora_type, target_modules=targets)
    matrices = {name: layer.mora_M["default"] for name, layer in tuner_layers(model).items()}
    plain = copy.deepcopy(base)

    def add_update(module: Any, args: Any, result: torch.Tensor, name: str) -> torch.Tensor:
        x = args[0]
        if isinstance(module, nn.Conv2d):
            x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).mT
        update = OPERATORS[mora_type](x, matrices[name], result.shape[1] if result.ndim == 4 else result.shape[-1])
        return result + (update.mT.reshape(result.shape) if isinstance(module, nn.Conv2d) else update)

    for name in matrices:
        plain.get_submodule(name).register_forward_hook(partial(add_update, name=name))
    expected, found = plain(**inputs).sample, model(**inputs).sample
    assert relative_error(found, expected) < MODEL64
    assert relative_error(found, base(**inputs).sample) > 0.01
    wanted, grads = (torch.autograd.grad(y.square().sum(), list(matrices.values())) for y in (expected, found))
    assert_gradients_close(dict(zip(matrices, grads, strict=True)), dict(zip(matrices, wanted, strict=True)))
    assert relative_error(model.merge_and_unload()(**inputs).sample, expected) < MODEL64


class Standardized(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            nn.Conv2d(4, 4, 3, groups=2),
            r"0 \(Conv2d\), which is a convolution in 2 groups.*ResLoRAConfig",
        ),
        (Standardized(4, 4, 3), r"cannot adapt 0 \(Standardized\), .*another convolution"),
        (nn.ConvTranspose2d(4, 4, 3), r"cannot adapt 0 \(ConvTranspose2d\), which is no linear layer"),
    ],
)
def test_what_cannot_be_right_is_refused(layer, message):
    model = nn.Sequential(layer)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoRAConfig(target_modules=["0"]))
    assert model[0] is layer


def test_all_linear_leaves_convolutions_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = Net(CASES["2d"]), nn.Linear(5, 3)

    model = get_peft_model(Both(), MoRAConfig(target_modules="all-linear"))
    assert list(tuner_layers(model)) == ["head"]
