"""ResLoRA on `nn.MultiheadAttention`: W + U in place of both of its weights, without writing into them."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from helpers.attention import (
    HEADS,
    SIZE,
    Net,
    adapted,
    dense_weights,
    encoder,
    expected,
    leaves,
    prepared,
    trained,
)
from helpers.gradients import assert_gradients_close
from helpers.oracle import randomize_adapters, relative_error
from helpers.refusals import refuse, state_of
from helpers.tolerances import FLOAT64, MODEL64
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from peft_reslora import ResLoRAConfig, describe_chains, export_lora, export_lora_from_files, merge_report
from peft_reslora.optim import factor_pairs
from peft_reslora.reslora.merging.plan import merges_from_state_dict
from peft_reslora.training import LayerGates
from peft_reslora.training.restartable import check_restartable

MASKS: dict[str, Any] = {
    "padding": lambda: {"key_padding_mask": padded(3, 5)},
    "causal": lambda: {"attn_mask": torch.triu(torch.ones(5, 5, dtype=torch.bool), 1), "is_causal": True},
    "added": lambda: {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)},
    "by head": lambda: {"attn_mask": torch.randn(3 * HEADS, 5, 5, dtype=torch.float64) > 1},
}
MADE: dict[str, dict[str, Any]] = {
    "batch first": {},
    "batch second": {"batch_first": False},
    "no bias": {"bias": False},
    "keys of its own": {"add_bias_kv": True, "add_zero_attn": True},
}


def padded(rows: int, length: int) -> torch.Tensor:
    """True where there is nothing: the rows have 1, 2, ... entries less."""
    return torch.arange(length) >= length - torch.arange(rows)[:, None]


def x_of(rows: int = 3, length: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(rows, length, SIZE, generator=torch.Generator().manual_seed(3), dtype=dtype)


def gradients_of(output: torch.Tensor, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    output.square().sum().backward()
    return {name: value.grad for name, value in values.items()}


class Attention(nn.Module):
    """One attention, in three blocks so that there is a chain; gives all that torch's gives."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": nn.MultiheadAttention(SIZE, HEADS, **options)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor, **options: Any) -> Any:
        first, seen = self.layers[0]["attn"](x, y, y, **options)
        return *self.layers[1]["attn"](first, first, first, **options), seen


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_outputs_and_weights_are_those_of_dense_weights(made, training):
    base = prepared(Attention(**MADE[made])).train(training)
    model = adapted(base).train(training)
    x = x_of(5, 5) if made == "batch second" else x_of()
    masks = {"none": dict} if made == "batch second" else {"none": dict, **MASKS}
    for options in (mask() | given for mask in masks.values() for given in ({}, {"average_attn_weights": False})):
        for y in (x, x.flip(0)):  # attention to itself, which has the fast path, and to others
            with torch.no_grad():
                found = model(x, y, **options)
            outputs = expected(base, dense_weights(base, leaves(model)), x, y, **options)
            for actual, wanted in zip(found, outputs, strict=True):
                kept = wanted.isfinite()  # a row of which all is masked has no weights
                assert torch.equal(actual.isfinite(), kept)
                assert relative_error(actual[kept], wanted[kept]) < FLOAT64
    assert relative_error(found[0], base(x, y, **options)[0]) > 1e-2


def test_without_weights_and_without_a_batch():
    base = prepared(Attention())
    model = adapted(base)
    weights = dense_weights(base, leaves(model))
    output, none, _ = model(x_of(), x_of(), need_weights=False)
    assert none is None
    assert relative_error(output, expected(base, weights, x_of(), x_of(), need_weights=False)[0]) < FLOAT64
    assert relative_error(model(x_of()[0], x_of()[1])[0], expected(base, weights, x_of()[0], x_of()[1])[0]) < FLOAT64


@pytest.mark.parametrize("pre_num", [1, -1])
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpointed", "re-entrant"])
@pytest.mark.parametrize("targets", [("attn",), ("attn", "mlp.0", "mlp.2")], ids=["attention", "linear layers too"])
def test_gradients_of_all_factors(pre_num, use_reentrant, targets):
    base = prepared(Net())
    model = adapted(base, targets, pre_num=pre_num)
    model.get_base_model().use_reentrant = use_reentrant
    x, same, values = x_of().requires_grad_(), x_of().requires_grad_(), leaves(model)
    actual, wanted = model(x), expected(base, dense_weights(base, values, pre_num), same)
    assert relative_error(actual, wanted) < FLOAT64
    assert len(values) == 2 * 3 * (len(targets) + 1)
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))
    assert relative_error(x.grad, same.grad) < FLOAT64
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
def test_the_fast_path_of_an_encoder_has_the_adapter(monkeypatch, mask, norm_first):
    """Which reads the weights past the attention's forward, for nested tensors too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = prepared(encoder(norm_first=norm_first)).eval()
    model = adapted(base).eval()
    options = {"none": {}, "padding": {"src_key_padding_mask": padded(3, 5)}}
    options["causal"] = {"mask": MASKS["causal"]()["attn_mask"], "is_causal": True}
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args[0]) or fast(*args))
    weights = dense_weights(base, leaves(model))
    rows = ~padded(3, 5) if mask == "padding" else torch.ones(3, 5, dtype=torch.bool)

    def error(model: nn.Module, weights: dict[str, torch.Tensor]) -> float:
        wanted = expected(base, weights, x_of(), **options[mask])
        return relative_error(model(x_of(), **options[mask])[rows], wanted[rows])

    with torch.no_grad():
        assert error(model, weights) < FLOAT64
        assert len(calls) == 3
        assert calls[0].is_nested == (mask == "padding" and not norm_first)
        assert error(model, {}) > 1e-2
        with model.disable_adapter():
            assert error(model, {}) < FLOAT64
        model.merge_adapter()
        assert error(model, weights) < FLOAT64
        with model.disable_adapter():  # which unmerges
            assert error(model, {}) < FLOAT64
        assert error(model, weights) < FLOAT64
    assert error(model, weights) < FLOAT64  # with gradients, there is no fast path


def test_an_encoder_whose_linear_layers_are_adapted_too():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        base = prepared(encoder())
        model = adapted(base, ("self_attn", "linear1", "linear2"))
        values = leaves(model)
        for training in (True, False):
            actual = model.train(training)(x_of(), src_key_padding_mask=padded(3, 5))
            wanted = expected(base, dense_weights(base, values), x_of(), src_key_padding_mask=padded(3, 5))
            assert relative_error(actual, wanted) < FLOAT64
        assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Reader(Net):
    """Computes with the weights of its attentions itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            attn, h = block.attn, x.transpose(0, 1)
            arguments = (
                attn.embed_dim,
                attn.num_heads,
                attn.in_proj_weight,
                attn.in_proj_bias,
                None,
                None,
                False,
                0.0,
            )
            h, _ = F.multi_head_attention_forward(h, h, h, *arguments, attn.out_proj.weight, attn.out_proj.bias)
            x = x + h.transpose(0, 1)
        return x


def test_whoever_reads_the_weights_has_the_adapter_and_its_gradients():
    base = prepared(Reader())
    model = adapted(base)
    values = leaves(model)
    actual, wanted = model(x_of()), expected(base, dense_weights(base, values), x_of())
    assert relative_error(actual, wanted) < FLOAT64
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))


class Own(nn.MultiheadAttention):
    """A forward of its own, in which out_proj is called, and which notes something on the module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        self.seen = (q @ k.mT).softmax(-1)
        return self.out_proj(self.seen @ v)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_subclass_computes_with_the_sums_in_its_own_way(compiled):
    base = prepared(nn.Sequential(Own(SIZE, HEADS), Own(SIZE, HEADS)))
    model = adapted(base, r".*\d")
    values = leaves(model)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    actual, wanted = run(x_of()), expected(base, dense_weights(base, values), x_of())
    assert relative_error(actual, wanted) < FLOAT64
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))
    assert relative_error(model.get_base_model()[1].base_layer.seen, base[1].seen) < FLOAT64


@pytest.mark.quick(targets=[("attn", "mlp.0")])
@pytest.mark.parametrize("targets", [("attn",), ("attn", "mlp.0")], ids=["attention", "a linear layer too"])
def test_compiled_as_a_whole(targets):
    base = prepared(Net())
    model = adapted(base, targets)
    values = leaves(model)
    actual, wanted = (
        torch.compile(model, backend="aot_eager", fullgraph=True)(x_of()),
        expected(base, dense_weights(base, values), x_of()),
    )
    assert relative_error(actual, wanted) < FLOAT64
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))


def test_a_base_layer_that_was_compiled_itself_has_the_adapter():
    base = prepared(Net())
    model = adapted(base)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.compile(backend="eager")
    assert relative_error(model(x_of()), expected(base, dense_weights(base, leaves(model)), x_of())) < FLOAT64


@pytest.mark.parametrize("targets", [("attn",), ("attn", "mlp.0")], ids=["attention", "a linear layer too"])
def test_exported_and_traced(targets):
    base = prepared(Net())
    model = adapted(base, targets).get_base_model().eval()
    wanted = expected(base, dense_weights(base, leaves(model)), x_of())
    for run in (torch.export.export(model, (x_of(),)).module(), torch.jit.trace(model, (x_of(),), check_trace=False)):
        assert relative_error(run(x_of()), wanted) < FLOAT64


def replica_of(model: nn.Module) -> nn.Module:
    """As DataParallel makes one on each device: weights are plain tensors there, with a way back to the parameters."""
    modules = list(model.modules())
    copies = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        for name, child in module._modules.items():
            copies[id(module)]._modules[name] = None if child is None else copies[id(child)]
        for name, parameter in module._parameters.items():
            setattr(copies[id(module)], name, None if parameter is None else parameter * 1)
    return copies[id(model)]


def test_replicas_have_the_adapter_and_its_gradients():
    base = prepared(Net())
    model = adapted(base)
    values = leaves(model)
    actual, wanted = replica_of(model)(x_of()), expected(base, dense_weights(base, values), x_of())
    assert relative_error(actual, wanted) < FLOAT64
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))


class Decoder(nn.TransformerDecoder):
    def __init__(self) -> None:
        super().__init__(nn.TransformerDecoderLayer(SIZE, HEADS, 12, 0.0, batch_first=True), 3)


def test_the_two_attentions_of_a_decoder_have_chains_of_their_own():
    base = prepared(Decoder())
    model = adapted(base, ("self_attn", "multihead_attn"))
    values, memory = leaves(model), x_of(3, 4)
    actual, wanted = model(x_of(), memory), expected(base, dense_weights(base, values), x_of(), memory)
    assert len(values) == 24
    assert relative_error(actual, wanted) < FLOAT64
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))
    assert relative_error(model.eval()(x_of(), memory), wanted) < FLOAT64


def test_the_first_pass_of_training_names_no_layer():
    model = adapted(prepared(Net()), ("attn", "mlp.0")).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x_of()).sum().backward()


def test_hooks_on_the_base_layer_run():
    base = prepared(Net())
    model = adapted(base)
    wanted = expected(base, dense_weights(base, leaves(model)), x_of())
    seen = []
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    assert relative_error(model(x_of()), wanted) < FLOAT64
    assert len(seen) == 3


@pytest.mark.parametrize("first", [True, False], ids=["before injection", "after it"])
def test_hooks_of_accelerate_that_move_inputs_run_around_the_sums(first):
    """As a `device_map` over several devices puts them on all modules."""
    base = prepared(Net())
    hook = {"execution_device": torch.device("cpu"), "io_same_device": True}
    if first:
        for module in base.modules():
            add_hook_to_module(module, AlignDevicesHook(**hook))
    model = adapted(base)
    if not first:
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook(**hook))
    values = leaves(model)
    actual, wanted = model(x_of()), expected(prepared(Net()), dense_weights(prepared(Net()), values), x_of())
    assert relative_error(actual, wanted) < FLOAT64
    assert_gradients_close(gradients_of(actual, trained(model)), gradients_of(wanted, values))
    with model.disable_adapter():
        assert relative_error(model(x_of()), prepared(Net())(x_of())) < FLOAT64
    model.merge_adapter()
    assert relative_error(model(x_of()), wanted) < FLOAT64


def test_threads_see_the_base_weights_as_they_are():
    base = prepared(Net())
    model = adapted(base).eval()
    wanted = model(x_of()).detach()
    before = {name: (id(p), p._version, p.detach().clone()) for name, p in model.named_parameters()}
    errors: list[float] = []

    def work() -> None:
        for n in range(40):
            with torch.set_grad_enabled(n % 2 == 0):
                errors.append(relative_error(model(x_of()), wanted))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(errors) == 160
    assert max(errors) < FLOAT64
    for name, p in model.named_parameters():
        assert (id(p), p._version) == before[name][:2]
        assert torch.equal(p, before[name][2])


def test_injection_keeps_the_parameters_themselves():
    base = prepared(Net())
    before = {name: id(p) for name, p in base.named_parameters()}
    model = get_peft_model(base, ResLoRAConfig(r=2, target_modules=["attn"]))
    model.state_dict()
    held = [(n.replace("base_layer.", ""), id(p)) for n, p in model.named_parameters() if "lora_" not in n]
    assert [(name.removeprefix("base_model.model."), p) for name, p in held] == list(before.items())
    unloaded = model.unload()
    assert {name: id(p) for name, p in unloaded.named_parameters()} == before
    assert type(unloaded.layers[0].attn) is nn.MultiheadAttention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_weights_in_half_precision_each_sum_is_rounded_once(dtype):
    base = prepared(Net(), dtype)
    model = adapted(base)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    weights = dense_weights(prepared(Net(), torch.float32), leaves(model))
    rounded = {
        name: (W.float() + (weights[name] - prepared(Net(), torch.float32).get_parameter(name))).to(dtype)
        for name, W in base.named_parameters()
        if name in weights
    }
    x = x_of(dtype=torch.float32).to(dtype)
    with torch.no_grad():
        for name, W in rounded.items():
            attn, _, part = name.rpartition(".attn.")
            layer = model.get_base_model().get_submodule(f"{attn}.attn")
            held = layer.in_proj_weight if part == "in_proj_weight" else layer.out_proj.weight
            assert held.dtype == dtype
            steps = (held.float() - W.float()).abs() / (W.float().abs() * torch.finfo(dtype).eps).clamp(min=1e-12)
            assert steps.max() <= 1.0  # the two ways of adding may round to either neighbor
        assert model(x).dtype == dtype


def test_autocast_does_not_round_the_update_alone():
    base = prepared(Net(), torch.float32)
    model = adapted(base)
    attn = model.get_base_model().layers[1].attn
    exact = attn.in_proj_weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attn.in_proj_weight, exact)
        model(x_of(dtype=torch.float32)).square().sum().backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_several_adapters_add_up_and_each_can_be_switched_off():
    base = prepared(Net())
    model = adapted(base)
    model.add_adapter("other", ResLoRAConfig(r=3, lora_alpha=3, target_modules=["attn"], pre_num=-1))
    randomize_adapters(model, seed=7)
    one = dense_weights(base, leaves(model))
    two = dense_weights(base, leaves(model, "other"), pre_num=-1, scaling=1.0)
    both = {name: one[name] + two[name] - base.get_parameter(name) for name in one}

    def error(weights: dict[str, torch.Tensor]) -> float:
        return relative_error(model(x_of()), expected(base, weights, x_of()))

    assert error(one) < FLOAT64
    model.base_model.set_adapter(["default", "other"])
    assert error(both) < FLOAT64
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert error(both) < FLOAT64
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.merge_adapter(["other"])
    assert error(two) < FLOAT64
    model.unmerge_adapter()
    model.base_model.set_adapter("other")
    assert error(two) < FLOAT64
    with model.disable_adapter():
        assert error({}) < FLOAT64
    model.base_model.add_weighted_adapter(["default"], [2.0], "twice", combination_type="cat")
    model.base_model.set_adapter("twice")
    twice = {name: 2 * one[name] - base.get_parameter(name) for name in one}
    assert error(twice) < MODEL64  # PEFT has the weights in float32
    model.delete_adapter("twice")
    model.delete_adapter("default")
    model.set_adapter("other")
    assert error(two) < FLOAT64


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merges_are_exact_and_undone_bit_for_bit(safe_merge):
    base = prepared(Net())
    model = adapted(base, ("attn", "mlp.0"))
    weights = dense_weights(base, leaves(model))
    wanted = expected(base, weights, x_of())
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(safe_merge=safe_merge)
        assert relative_error(model(x_of()), wanted) < FLOAT64
        model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert relative_error(model(x_of()), wanted) < FLOAT64
    unloaded = model.merge_and_unload(safe_merge=safe_merge)
    assert relative_error(unloaded(x_of()), wanted) < FLOAT64
    assert list(dict(unloaded.named_parameters())) == list(dict(base.named_parameters()))
    for name, W in weights.items():
        assert relative_error(unloaded.get_parameter(name), W) < FLOAT64


def test_a_layer_merged_on_its_own_is_merged_in_both_weights():
    base = prepared(Net())
    model = adapted(base)
    wanted = model(x_of()).detach()
    attn = model.get_base_model().layers[2].attn
    attn.merge()
    assert attn.merged
    assert attn.base_layer.out_proj.merged
    assert relative_error(model(x_of()), wanted) < FLOAT64
    attn.unmerge()
    attn.base_layer.out_proj.merge()  # one of the two: the other is added, as before
    assert relative_error(model(x_of()), wanted) < FLOAT64


@pytest.mark.parametrize("layer", ["layers.1.attn", "layers.1.attn.base_layer.out_proj"])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_broken_merge_is_refused_before_either_weight_is_changed(layer, value):
    model = adapted(prepared(Net(), torch.float32))
    with torch.no_grad():
        for factor in "AB":
            trained(model)[f"{layer}.lora_{factor}"][0, 0] = value
    for act in (model.merge_adapter, lambda: model.merge_and_unload(safe_merge=True)):
        held = {name: p.detach().clone() for name, p in model.named_parameters()}
        refuse(model, "NaN", act)
        for name, p in model.named_parameters():
            assert torch.equal(p, held[name]) or value != value


def test_merges_into_offloaded_weights_are_refused():
    """accelerate loads no weight for a module that nobody calls, as out_proj."""
    model = adapted(prepared(Net()))
    cpu_offload(model, execution_device=torch.device("cpu"))
    for act in (model.merge_adapter, model.merge_and_unload):
        refuse(model, r"into attention 'layers\.0\.attn', whose weights are sharded or offloaded", act)


def test_saved_under_the_keys_of_peft_and_loaded(tmp_path):
    base = prepared(Net())
    model = adapted(base, ("attn", "mlp.0"))
    wanted = model(x_of()).detach()
    model.save_pretrained(tmp_path)
    plain = get_peft_model(prepared(Net()), LoraConfig(r=2, target_modules=["attn", "mlp.0"]))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    stamps = {key for key in saved if "magnitude" in key}
    assert {key: tuple(tensor.shape) for key, tensor in saved.items() if key not in stamps} == {
        key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(plain).items()
    }
    assert len(stamps) == 9
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(prepared(Net()), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert relative_error(loaded(x_of()), wanted) < FLOAT64
        loaded.load_adapter(tmp_path, "again")
        loaded.set_adapter("again")
        assert relative_error(loaded(x_of()), wanted) < FLOAT64
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert relative_error(copied(x_of()), wanted) < FLOAT64


@pytest.mark.parametrize("part", ["attn.lora_A", "attn.base_layer.out_proj.lora_B"])
def test_a_damaged_file_is_refused(tmp_path, part):
    adapted(prepared(Net())).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.layers.1.{part}.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="is not what was saved"):
        PeftModel.from_pretrained(prepared(Net()), tmp_path)


@pytest.mark.parametrize("read", [False, True], ids=["called", "read"])
def test_what_another_loader_leaves_of_out_proj_is_checked_when_it_is_first_used(tmp_path, read):
    adapted(prepared(Net())).save_pretrained(tmp_path)
    config = ResLoRAConfig.from_pretrained(tmp_path)
    model = get_peft_model(prepared(Reader() if read else Net()), config)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.layers.1.attn.base_layer.out_proj.lora_B.weight"][0, 0] += 1
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    named = {key if key.endswith("weight") else f"{key}.default": tensor for key, tensor in named.items()}
    assert not model.load_state_dict(named, strict=False).unexpected_keys
    with pytest.raises(RuntimeError, match=r"layers\.1\.attn\.base_layer\.out_proj.*is not what was saved"):
        model(x_of())


def test_patterns_name_the_attention_for_both_weights(tmp_path):
    base = prepared(Net())
    patterns = {"rank_pattern": {"layers.1.attn": 4}, "alpha_pattern": {"layers.2.attn": 5}}
    model = adapted(base, **patterns, use_rslora=True)
    scalings = [3 / 2**0.5, 3 / 4**0.5, 5 / 2**0.5]
    values = {
        name: value * scalings[int(name.split(".")[1])] if name.endswith("lora_B") else value
        for name, value in leaves(model).items()
    }
    wanted = expected(base, dense_weights(base, values, scaling=1.0), x_of())
    assert relative_error(model(x_of()), wanted) < FLOAT64
    model.save_pretrained(tmp_path)
    config = ResLoRAConfig.from_pretrained(tmp_path)
    places = merges_from_state_dict(config, load_file(tmp_path / "adapter_model.safetensors"))
    assert {len(merge.blocks) for merge, _ in places.values()} == {3}
    for name, (merge, position) in places.items():
        A, B = merge.factors(position)
        layer = model.get_base_model().get_submodule(name)
        assert relative_error(B @ A, layer.get_delta_weight("default")) < FLOAT64


def test_an_attention_between_that_is_not_targeted_ends_both_chains():
    config = ResLoRAConfig(r=2, target_modules=r"layers\.[02]\.attn")
    before = describe_chains(prepared(Net()), config)
    with pytest.warns(UserWarning, match="no shortcut at all"):
        model = get_peft_model(prepared(Net()), config)
    assert [len(chain) for chain in describe_chains(model).chains] == [1, 1, 1, 1]
    assert str(before) == str(describe_chains(model))


def test_chains_are_described_with_a_batch():
    base = prepared(Net())
    for table in (
        describe_chains(adapted(base), batch={"x": x_of()}),
        describe_chains(base, ResLoRAConfig(r=2, target_modules=["attn"]), batch={"x": x_of()}),
    ):
        assert [chain[0].shape for chain in table.chains] == ["8->24", "8->8"]
        assert table.findings == ()


class Classifier(Net):
    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return SimpleNamespace(logits=super().forward(x))


def test_the_other_tools_know_both_weights():
    model = adapted(prepared(Classifier()))
    assert merge_report(model, [{"x": x_of()}]).rounded
    assert len(factor_pairs(model)) == 6
    attn = model.get_base_model().layers[1].attn
    assert not attn.supports_lora_conversion()
    assert not attn.base_layer.out_proj.supports_lora_conversion()
    with pytest.raises(TypeError, match="MultiheadAttention"):
        convert_to_lora(model, rank=4)
    for refused in (check_restartable, LayerGates):
        with pytest.raises(ValueError, match=r"ayer (base_model\.model\.)?layers\.0\.attn|'base_model.*attn'"):
            refused(model)


def test_exports_are_refused_since_peft_adds_the_update_of_out_proj_twice(tmp_path):
    """When this fails, PEFT has been mended, and the exports may be written."""
    base = prepared(Net())
    model = get_peft_model(prepared(Net()), LoraConfig(r=2, lora_alpha=3, target_modules=["attn"]))
    randomize_adapters(model)
    values = leaves(model)
    twice = {name: value * (2 if "out_proj" in name and "lora_B" in name else 1) for name, value in values.items()}
    assert relative_error(model(x_of()), expected(base, dense_weights(base, twice, pre_num=0), x_of())) < FLOAT64
    ours = adapted(base)
    message = r"layer 'layers\.0\.attn': .*PEFT's LoRA adds the update twice.*merge_and_unload"
    for adapter in (model, ours):
        with pytest.raises(ValueError, match=message):
            export_lora(adapter)
        adapter.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            export_lora_from_files(tmp_path)


def test_bits_of_a_config_that_would_be_lost_are_refused():
    for fields, message in (
        ({"lora_dropout": 0.1}, r"layers\.\*\.attn \(MultiheadAttention, 3 layers\), in which lora_dropout=0.1"),
        ({"shortcut": "input"}, "query, key and value"),
        ({"nested_ranks": True}, "has no blocks of nested ranks"),
        ({"target_modules": ["attn", "out_proj"]}, r"attn\.out_proj .*read by MultiheadAttention past its forward"),
    ):
        base = prepared(Net())
        config = ResLoRAConfig(**{"r": 2, "target_modules": ["attn"], **fields})
        refuse(base, message, lambda base=base, config=config: get_peft_model(base, config))


def test_the_orientation_of_other_layers_is_not_that_of_out_proj():
    base = prepared(Net())
    model = adapted(base, fan_in_fan_out=True)
    assert relative_error(model(x_of()), expected(base, dense_weights(base, leaves(model)), x_of())) < FLOAT64


class Wide(nn.MultiheadAttention):
    """PEFT's in_proj_weight is that of queries, keys and values of one size."""

    def __init__(self) -> None:
        super().__init__(SIZE, HEADS, kdim=6)


def quantized() -> nn.Module:
    attention = nn.MultiheadAttention(SIZE, HEADS)
    attention.in_proj_weight = nn.Parameter(torch.zeros(3 * SIZE, SIZE, dtype=torch.int8), requires_grad=False)
    return attention


def replaced() -> nn.Module:
    attention = nn.MultiheadAttention(SIZE, HEADS)
    attention.forward = functools.partial(type(attention).forward, attention)
    return attention


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wide, "another size than its queries"),
        (lambda: parametrizations.spectral_norm(nn.MultiheadAttention(SIZE, HEADS), "in_proj_weight"), "computed"),
        (quantized, "quantized"),
        (replaced, "in the place of whose forward"),
    ],
    ids=["other sizes", "computed", "quantized", "replaced"],
)
def test_attention_that_cannot_have_a_stand_in_is_refused(make, message):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "attn": make()})
    refuse(
        model,
        rf"cannot adapt attn \(\w+\), .*{message}",
        lambda: get_peft_model(model, ResLoRAConfig(target_modules=["first", "attn"])),
    )


def test_what_is_put_around_or_into_the_base_layer_later_is_refused_in_the_forward():
    for change in (
        lambda attn: setattr(
            attn.base_layer, "forward", functools.partial(type(attn.base_layer).forward, attn.base_layer)
        ),
        lambda attn: setattr(attn, "base_layer", checkpoint_wrapper(attn.base_layer)),
    ):
        model = adapted(prepared(Net()))
        change(model.get_base_model().layers[1].attn)
        with pytest.raises(RuntimeError, match=r"attention 'layers\.1\.attn' is called by"):
            model(x_of())
    model = adapted(prepared(Net()))
    attn = model.get_base_model().layers[1].attn
    attn.base_layer.in_proj_weight = nn.Parameter(attn.in_proj_weight.detach().to("meta"))
    with pytest.raises(RuntimeError, match=r"weight of layer 'layers\.1\.attn', to which"):
        model(x_of())


def test_adapters_of_peft_and_ours_do_not_share_an_attention():
    model = get_peft_model(prepared(Net()), LoraConfig(r=2, target_modules=["attn"])).get_base_model()
    refuse_state = state_of(model)
    with pytest.raises(ValueError, match="adapter of PEFT's"):
        get_peft_model(model, ResLoRAConfig(r=2, target_modules=["attn"]))
    assert state_of(model)["modules"] == refuse_state["modules"]
    ours = adapted(prepared(Net())).get_base_model()
    with pytest.raises(ValueError, match="one of LoraConfig cannot be added"):
        get_peft_model(ours, LoraConfig(r=2, target_modules=["attn"]), adapter_name="lora")


def test_adapters_set_apart_and_mixed_batches_are_refused():
    model = adapted(prepared(Net()))
    model.add_adapter("other", ResLoRAConfig(r=2, target_modules=["attn"]))
    model.get_base_model().layers[1].attn.base_layer.out_proj.set_adapter("other")
    with pytest.raises(ValueError, match=r"'layers\.1\.attn' has the active adapters"):
        model(x_of())
    with pytest.raises(TypeError, match="mixed adapter batches"):
        adapted(prepared(Net())).eval()(x_of(), adapter_names=["default"] * 3)
