"""Convolutions: output, gradients and merges against dense kernels in float64, and the exports in plain PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adapters import ESTIMATED, ONE_OR_ALL, tuner_layers
from helpers.convolutions import CASES, Net, adapted, images, net
from helpers.gradients import assert_gradients_close
from helpers.oracle import relative_error
from helpers.tolerances import FLOAT64
from peft import PeftModel
from torch import nn

from peft_reslora import export_lora, save_as_lora
from peft_reslora.reslora.linking import chains_of

pytestmark = pytest.mark.usefixtures("float64")
IN_PEFT = [name for name in CASES if name not in ("dilation", "padded in a circle", "groups of 1d, reflected")]
every_case = pytest.mark.parametrize("case", CASES)
quick = pytest.mark.quick(case=["2d", "groups"], pre_num=[1])


def factors(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Leaves of each layer: A and B as they are held, and the scaling."""
    return {
        name: (
            layer.lora_A["default"].weight.detach().clone().requires_grad_(),
            layer.lora_B["default"].weight.detach().clone().requires_grad_(),
            layer.scaling["default"],
        )
        for name, layer in tuner_layers(model).items()
    }


def kernel_of(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """The kernel of B after A, group by group, entry by entry."""
    groups = A.shape[0] // B.shape[1]
    pairs = zip(A.chunk(groups), B.chunk(groups), strict=True)
    return torch.cat([torch.einsum("or,ri...->oi...", b.flatten(1), a) for a, b in pairs])


def convolve(layer: Any, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """By a convolution of its own with that kernel, made as the layer is."""
    own = type(layer)(
        x.shape[1],
        kernel.shape[0],
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=False,
        padding_mode=layer.padding_mode,
    )
    return torch.func.functional_call(own, {"weight": kernel}, (x,))


def oracle(base: Net, leaves: dict, x: torch.Tensor, shortcut: str, pre_num: int) -> torch.Tensor:
    """The equations with dense kernels, on the plain model."""
    base, seen, handles = copy.deepcopy(base), {}, []
    modules = dict(base.named_modules())
    chains = [[f"layers.{n}.{name}" for n in range(3)] for name in ("up", "down")] + [["step"]]

    def update(chain: list[str], n: int) -> torch.Tensor:
        layer, x = modules[chain[n]], seen[chain[n]]
        span = chain[max(0, n - pre_num) if pre_num != -1 else 0 : n + 1]
        A, B, s = leaves[chain[n]]
        if shortcut == "input":
            return s * convolve(layer, x + (seen[chain[n - 1]] if n else x), kernel_of(A, B))
        if shortcut == "block":
            return sum(leaves[k][2] * convolve(layer, x, kernel_of(*leaves[k][:2])) for k in span)
        hidden = sum(convolve(modules[k], seen[k], leaves[k][0]) for k in span)
        groups = B.shape[0] * hidden.shape[1] // (B.shape[1] * B.shape[0])
        pairs = zip(hidden.chunk(groups, 1), B.chunk(groups), strict=True)
        return s * torch.cat([torch.einsum("or,br...->bo...", b.flatten(1), h) for h, b in pairs], 1)

    for chain in chains:
        for n, name in enumerate(chain):

            def hook(module: nn.Module, args: Any, output: torch.Tensor, chain=chain, n=n) -> torch.Tensor:
                seen[chain[n]] = args[0]
                return output + update(chain, n)

            handles.append(modules[name].register_forward_hook(hook))
    output = base(x)
    for handle in handles:
        handle.remove()
    return output


def gradients_of(output: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * probe).sum().backward()
    return {name: leaf.grad.clone() for name, leaf in leaves.items()}


def compare_with_oracle(case: str, shortcut: str, pre_num: int, change: Callable[[Any], None] = lambda net: None):
    base, x = net(case), images(case).requires_grad_()
    model = adapted(base, shortcut, pre_num)
    leaves = factors(model)
    expected = oracle(base, leaves, x, shortcut, pre_num)
    change(model.get_base_model())
    actual = model(x)
    assert relative_error(actual, expected) < FLOAT64
    assert relative_error(actual, base(x)) > 0.01
    layers = tuner_layers(model)
    ours = {f"{n}.{f}": getattr(layers[n], f"lora_{f}")["default"].weight for n in leaves for f in "AB"}
    theirs = {f"{n}.{f}": leaves[n]["AB".index(f)] for n in leaves for f in "AB"}
    found = gradients_of(actual, ours | {"x": x})
    x.grad = None
    assert_gradients_close(found, gradients_of(expected, theirs | {"x": x}))


@quick
@every_case
@pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
def test_output_and_gradients_are_those_of_dense_kernels(case, shortcut, pre_num):
    compare_with_oracle(case, shortcut, pre_num)


@pytest.mark.quick(case=["2d"], pre_num=[1])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", ["2d", "groups"])
@pytest.mark.parametrize(("shortcut", "pre_num"), ONE_OR_ALL)
def test_under_checkpointing_too(case, shortcut, pre_num, reentrant):
    compare_with_oracle(case, shortcut, pre_num, lambda net: setattr(net, "reentrant", reentrant))


@quick
@every_case
@pytest.mark.parametrize("pre_num", [1, -1])
@pytest.mark.parametrize("safe_merge", [True, False])
def test_block_merges_exactly_and_is_restored_bit_for_bit(case, pre_num, safe_merge):
    base, x = net(case), images(case)
    model = adapted(base, "block", pre_num)
    expected, before = model(x), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=safe_merge)
    assert relative_error(model(x), expected) < FLOAT64
    assert not torch.equal(model.get_base_model().step.base_layer.weight, base.step.weight)
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert relative_error(merged(x), expected) < FLOAT64
    assert {type(m) for m in merged.modules()} == {type(m) for m in base.modules()}


@pytest.mark.quick(case=["2d"], pre_num=[1])
@every_case
@pytest.mark.parametrize(("shortcut", "pre_num"), ESTIMATED)
@pytest.mark.parametrize("estimator", ["input_norm", "weight_norm", "drop"])
def test_estimated_merges_scale_the_kernels(case, shortcut, pre_num, estimator):
    """Eq. 9, 11, 12 and 13, with norms of whole kernels."""
    model = adapted(net(case), shortcut, pre_num, merge_estimator=estimator, norm_window=2)
    model.train()(images(case))
    model.eval()
    leaves, layers = factors(model), tuner_layers(model)
    kernels = {}
    for chain in chains_of(model, "default"):
        norms = [float(layers[name].lora_norm["default"][-1]) for name in chain.names]
        weights: list[float] = []  # of merged kernels
        for n, name in enumerate(chain.names):
            A, B, s = leaves[name]
            earlier = range(n - 1, -1 if pre_num == -1 else max(-1, n - 1 - pre_num), -1)
            if shortcut == "input" and n == 0:
                E = A
            elif estimator == "drop":
                E = 0 * A
            elif estimator == "input_norm":
                E = sum((norms[k] / norms[n] * A for k in earlier), 0 * A)
            else:
                by = {k: weights[k - 1] / weights[n - 1] if k else 1.0 for k in earlier}
                E = sum((a * (A if shortcut == "input" else leaves[chain.names[k]][0]) for k, a in by.items()), 0 * A)
            kernels[name] = s * kernel_of(A + E, B)
            weights.append(float((layers[name].get_base_layer().weight + kernels[name]).detach().norm()))
    for name, kernel in kernels.items():
        assert relative_error(layers[name].get_delta_weight("default"), kernel) < FLOAT64, name


@pytest.mark.quick(case=["2d", "groups"], shortcut=["block"])
@pytest.mark.quick(case=["2d"])
@every_case
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_saved_adapters_load_with_the_same_output(case, shortcut, tmp_path):
    base, x = net(case), images(case)
    model = adapted(base, shortcut)
    expected = model(x)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        assert torch.equal(loaded(x), expected)
        assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.filterwarnings("ignore:.*of its update", "ignore:The LoRA has r=", "ignore:LoRA adapter added to ConvNd")
@quick
@pytest.mark.parametrize("case", IN_PEFT)
@pytest.mark.parametrize("pre_num", [1, -1])
def test_the_export_of_block_is_exact_in_plain_peft(case, pre_num, tmp_path):
    base, x = net(case), images(case)
    model = adapted(base, "block", pre_num)
    export = save_as_lora(tmp_path, model, base_model=copy.deepcopy(base).float())
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    assert relative_error(plain(x), model(x)) < 20 * torch.finfo(torch.float32).eps  # that of the file's numbers
    assert all(layer.exact for layer in export.report.layers)


@pytest.mark.filterwarnings("ignore:.*of its update", "ignore:The LoRA has r=")
def test_a_truncated_export_keeps_the_best_flattened_kernels():
    model = adapted(net("2d"), "block", -1)
    export = export_lora(model, rank=3)
    for name, layer in tuner_layers(model).items():
        A, B = (export.state_dict[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        U, S, V = torch.linalg.svd(layer.get_delta_weight("default").flatten(1), full_matrices=False)
        best = (U[:, :3] * S[:3]) @ V[:3]
        assert relative_error(B.flatten(1) @ A.flatten(1), best) < 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("case", ["dilation", "padded in a circle"])
def test_an_export_that_peft_would_misread_is_refused(case):
    with pytest.raises(ValueError, match=r"layer 'layers\.0\.up': .*which PEFT's LoRA ignores.*merge_and_unload"):
        export_lora(adapted(net(case), "block"))
