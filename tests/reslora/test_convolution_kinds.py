"""AdaLoRA, nested ranks and DoRA on convolutions and embeddings: what is pruned, cut off, saved and merged.

That output and gradients are those of the equation, `test_layer_kinds.py` shows for each cell of its table.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import tuner_layers
from helpers.convolutions import adapted, images, net, randomized
from helpers.gradients import assert_gradients_close
from helpers.oracle import relative_error
from helpers.tolerances import FLOAT64, MODEL64, half_rounding
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_reslora import ResLoRAConfig, calibrate_merge
from peft_reslora.reslora.blocks import FORMS, KINDS, block_kind
from peft_reslora.reslora.linking import chains_of
from peft_reslora.reslora.rank_allocation import orthogonality
from peft_reslora.training import anneal_shortcuts, rank_in_use, set_rank, update_and_allocate

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.filterwarnings("ignore:.* linked to no other")]

KIND: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "AdaLoRA": {"total_step": 12, "tfinal": 2, "init_r": 4, "target_r": 2, "r": 8},
    "nested": {"nested_ranks": True},
}
CELLS = [("DoRA", "block"), *((kind, name) for kind in ("AdaLoRA", "nested") for name in ("input", "block", "middle"))]
every_cell = pytest.mark.parametrize(("kind", "shortcut"), CELLS)
groups_too = pytest.mark.parametrize("case", ["2d", "groups"])


def model_of(case: str, kind: str, shortcut: str = "block", **fields: Any) -> PeftModel:
    """With random factors, norms that are not those of the weights, and 2 of 4 directions in use."""
    model = adapted(net(case), shortcut, **{**KIND[kind], **fields})
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            layer = model.get_submodule(name.split(".lora_magnitude")[0])
            norms = layer.get_base_layer().weight.flatten(1).norm(dim=1)
            p.data = norms * (1.2 + 0.1 * torch.randn(len(p), generator=generator))
    if kind == "nested":
        set_rank(model, 2)
    return model


def gradients_of(model: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_kind_of_block_comes_in_every_form():
    configs = [{"use_dora": True}, {"total_step": 9}, {"nested_ranks": True}, {}]
    layers = [nn.Conv1d(2, 2, 3), nn.Embedding(3, 2), nn.Linear(2, 2)]
    for config, (_, kind) in zip(configs, KINDS, strict=True):
        for layer, (_, form) in zip(layers, FORMS, strict=True):
            block = block_kind(ResLoRAConfig(**config), layer)
            assert issubclass(block, kind)
            assert issubclass(block, form)
            assert pickle.loads(pickle.dumps(block)) is block


@pytest.mark.quick(case=["groups"], shortcut=["block"], reentrant=[True])
@groups_too
@every_cell
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_it_is_the_same(case, kind, shortcut, reentrant):
    model, x = model_of(case, kind, shortcut), images(case).requires_grad_()
    expected = model(x)
    wanted = gradients_of(model, expected)
    model.get_base_model().reentrant = reentrant
    found = model(x)
    if kind == "nested":
        set_rank(model, 4)  # what is computed again is as it was
    assert relative_error(found, expected) < FLOAT64
    assert_gradients_close(gradients_of(model, found), wanted)


@pytest.mark.quick(case=["groups"], shortcut=["block"])
@groups_too
@every_cell
def test_where_hooks_load_the_factors_it_is_the_same(case, kind, shortcut):
    model, x = model_of(case, kind, shortcut), images(case)
    expected = model(x)
    for layer in tuner_layers(model).values():
        layer.lora_A["default"].register_forward_pre_hook(lambda module, args: None)
    assert relative_error(model(x), expected) < FLOAT64


@pytest.mark.quick(case=["groups"], shortcut=["block"])
@groups_too
@every_cell
def test_without_gradients_it_is_the_same(case, kind, shortcut):
    model, x = model_of(case, kind, shortcut), images(case)
    expected = model(x)
    with torch.no_grad():
        assert relative_error(model(x), expected) < FLOAT64
    with torch.inference_mode():
        assert relative_error(model(x), expected) < FLOAT64


@pytest.mark.quick(case=["groups"], shortcut=["block"])
@groups_too
@every_cell
def test_saved_loaded_and_copied_it_is_the_same(case, kind, shortcut, tmp_path):
    model, x = model_of(case, kind, shortcut), images(case)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(net(case), tmp_path, **options).eval()
        if kind == "nested":
            set_rank(loaded, 2)
        assert torch.equal(loaded(x), expected)


@pytest.mark.quick(case=["groups"], safe_merge=[True])
@groups_too
@pytest.mark.parametrize("kind", KIND)
@pytest.mark.parametrize("safe_merge", [True, False])
def test_block_merges_exactly_and_is_restored_bit_for_bit(case, kind, safe_merge):
    model, x = model_of(case, kind, pre_num=-1), images(case)
    expected, before = model(x), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=safe_merge)
    assert relative_error(model(x), expected) < FLOAT64
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert relative_error(merged(x), expected) < FLOAT64
    assert all(p.is_contiguous() for p in merged.parameters())


@pytest.mark.quick(case=["groups"], shortcut=["middle"])
@groups_too
@pytest.mark.parametrize("kind", ["AdaLoRA", "nested"])
@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_estimated_merges_are_those_of_a_lora_with_the_weights_in_b(case, kind, shortcut):
    model, x = model_of(case, kind, shortcut, merge_estimator="weight_norm"), images(case)
    config = {"r": 4, "lora_alpha": 6 if kind == "AdaLoRA" else 12}  # s of nested ranks is that of rank 2
    plain = adapted(net(case), shortcut, merge_estimator="weight_norm", **config)
    for name, layer in tuner_layers(model).items():
        own, groups = tuner_layers(plain)[name], layer.get_base_layer().groups
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.data for f in "AB")
        own.lora_A["default"].weight.data, own.lora_B["default"].weight.data = A.clone(), B.clone()
        weights = layer.lora_E["default"].data.flatten() if kind == "AdaLoRA" else torch.tensor([1.0, 0, 1, 0])
        if kind == "nested" and groups == 1:
            weights = torch.tensor([1.0, 1, 0, 0])
        for part, numbers in zip(own.lora_B["default"].weight.data.chunk(groups), weights.chunk(groups), strict=True):
            part *= numbers.view(1, -1, 1, 1)
        own.scaling["default"] = layer.scaling["default"] * (2 if kind == "nested" else 1)
    assert relative_error(model(x), plain(x)) < FLOAT64
    if kind == "AdaLoRA" or shortcut == "input":
        assert relative_error(model.merge_and_unload()(x), plain.merge_and_unload()(x)) < FLOAT64


# AdaLoRA


class Scored(nn.Module):
    """With a loss, of which the orthogonality term is a part."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.net = net(case)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        out = self.net(x)
        return SequenceClassifierOutput(loss=None if labels is None else F.mse_loss(out, labels), logits=out)


def scored(case: str, shortcut: str = "block", **fields: Any) -> PeftModel:
    return adapted(Scored(case), shortcut, **{**KIND["AdaLoRA"], "init_r": 6, "target_r": 2, **fields})


def entries_of(layer: Any, direction: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Where the numbers of one direction stand in A and in B, in which it is a column of its group's rows."""
    base = layer.get_base_layer()
    per_group = layer.r["default"] // base.groups
    group, column = divmod(direction, per_group)
    rows = range(group * base.out_channels // base.groups, (group + 1) * base.out_channels // base.groups)
    return [("lora_A", (direction,)), ("lora_B", (list(rows), column))]


@pytest.mark.quick(case=["groups"], shortcut=["block"])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
@groups_too
def test_the_directions_with_the_least_importance_are_pruned(case, shortcut):
    """Each by its own numbers: sensitivity times uncertainty, in E and as means over its row of A and column of B."""
    model, x = scored(case, shortcut), images(case)
    with torch.no_grad():
        target = model.get_base_model().net(x) * 0.5 + 1
    beta = 0.85
    means: dict[Any, torch.Tensor] = {}
    spreads: dict[Any, torch.Tensor] = {}
    for step in range(3):
        model(x, labels=target).loss.backward()
        for name, layer in tuner_layers(model).items():
            for part in ("lora_A", "lora_B", "lora_E"):
                p = getattr(layer, part)["default"]
                p, key = getattr(p, "weight", p), (name, part)
                now = (p * p.grad).abs().detach()
                means[key] = beta * means.get(key, 0) + (1 - beta) * now
                spreads[key] = beta * spreads.get(key, 0) + (1 - beta) * (now - means[key]).abs()
        update_and_allocate(model, step)
        model.zero_grad()
    scores, total = [], 0
    for name, layer in tuner_layers(model).items():
        for direction in range(6):
            score = (means[name, "lora_E"] * spreads[name, "lora_E"])[direction, 0]
            for part, where in entries_of(layer, direction):
                score = score + (means[name, part] * spreads[name, part])[where].mean()
            scores.append((float(score), name, direction))
        total += 6
    kept = int((total - 2 * len(tuner_layers(model))) * (1 - 2 / 10) ** 3 + 2 * len(tuner_layers(model)))
    pruned = {(name, direction) for _, name, direction in sorted(scores)[: total - kept]}
    for name, layer in tuner_layers(model).items():
        zero = (layer.lora_E["default"].flatten() == 0).nonzero().flatten().tolist()
        assert {(name, d) for d in zero} == {own for own in pruned if own[0] == name}


@groups_too
def test_the_orthogonality_term_is_that_of_whole_matrices(case):
    model = scored(case)
    expected, blocks = [], []
    for layer in tuner_layers(model).values():
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.detach() for f in "AB")
        groups = layer.get_base_layer().groups
        whole_a, whole_b = (torch.block_diag(*factor.flatten(1).chunk(groups)) for factor in (A, B))
        expected += [(whole_a @ whole_a.T - torch.eye(6)).norm(), (whole_b.T @ whole_b - torch.eye(6)).norm()]
        blocks.append(layer.block_of("default"))
    assert relative_error(orthogonality(blocks), torch.stack(expected).mean()) < FLOAT64


def pruned_by_hand(model: nn.Module) -> nn.Module:
    """As at the end of an allocation, with groups that need one direction, several, or none."""
    masks = [[1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    for n, layer in enumerate(tuner_layers(model).values()):
        layer.lora_E["default"].data *= torch.tensor(masks[n % len(masks)])[:, None]
    for chain in chains_of(model, "default"):
        chain.allocation = None
    model.peft_config["default"].rank_pattern = {"_": 1}  # so that what is zero counts as allocated
    model.train()
    update_and_allocate(model, 20)
    return model.eval()


@pytest.mark.quick(case=["groups"])
@groups_too
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_pruned_directions_are_not_saved_and_groups_stay_even(case, shortcut, tmp_path, command):
    model, x = pruned_by_hand(scored(case, shortcut)), images(case)
    expected = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Scored(case).eval(), tmp_path, is_trainable=True).eval()
    assert relative_error(loaded(x).logits, expected) < FLOAT64
    for name, layer in tuner_layers(model).items():
        other, groups = tuner_layers(loaded)[name], layer.get_base_layer().groups
        needed = (layer.lora_E["default"].flatten() != 0).view(groups, -1).sum(dim=1)
        if shortcut != "middle":  # of which all layers of a chain keep what one needs
            assert other.r["default"] == groups * max(1, int(needed.max()))
        A, B, E = other.lora_A["default"], other.lora_B["default"], other.lora_E["default"]
        assert A.out_channels == B.in_channels == len(A.weight) == len(E) == other.r["default"] <= 6
        assert other.scaling == layer.scaling
        if shortcut == "block":
            delta = layer.get_delta_weight("default")
            assert torch.allclose(other.get_delta_weight("default"), delta, rtol=FLOAT64, atol=FLOAT64)
    lazily = PeftModel.from_pretrained(Scored(case).eval(), tmp_path, low_cpu_mem_usage=True).eval()
    assert relative_error(lazily(x).logits, expected) < FLOAT64
    assert "(3x3)" in command("inspect", tmp_path).out
    update_and_allocate(loaded.train(), 30)  # what is zero in an uneven group stays so
    assert relative_error(loaded.eval()(x).logits, expected) < FLOAT64


@pytest.mark.parametrize(("case", "annealed"), [("2d", False), ("2d", True), ("groups", True)])
def test_an_estimate_is_pruned_with_its_directions(case, annealed, tmp_path):
    """Whether it was fitted, or is a part of the forward pass."""
    estimator = "weight_norm" if annealed else "least_squares"
    model, x = pruned_by_hand(scored(case, "middle", merge_estimator=estimator)), images(case, batch=4)
    if annealed:
        anneal_shortcuts(model, 0.5)
    else:
        calibrate_merge(model, [{"x": x}])
    before = model(x).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Scored(case).eval(), tmp_path).eval()
    assert {layer.r["default"] for layer in tuner_layers(loaded).values()} != {6}
    bound = half_rounding(100, torch.float32)  # in which C_n is kept
    assert relative_error(loaded(x).logits, before) < bound
    expected = model.merge_and_unload()(x).logits
    assert relative_error(loaded.merge_and_unload()(x).logits, expected) < bound


# Nested ranks


@pytest.mark.quick(rank=[3])
@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_in_groups_a_rank_is_the_next_that_they_share(rank, shortcut):
    model, x = adapted(net("groups"), shortcut, r=8, nested_ranks=True), images("groups")
    per_group = -(-rank // 2)
    lower = adapted(net("groups"), shortcut, r=2 * per_group)
    for name, layer in tuner_layers(model).items():
        own, groups = tuner_layers(lower)[name], layer.get_base_layer().groups
        b = 2 * per_group // groups if groups == 2 else min(rank, 8)
        if groups == 1:  # in no chain, of a rank of its own
            own.r["default"], own.scaling["default"] = b, 6 / b
            own.lora_A["default"].out_channels = own.lora_B["default"].in_channels = b
        A, B = (getattr(layer, f"lora_{f}")["default"].weight.data for f in "AB")
        own.lora_A["default"].weight.data = torch.cat([part[:b] for part in A.chunk(groups)])
        own.lora_B["default"].weight.data = B[:, :b].clone()
    with rank_in_use(model, rank):
        assert relative_error(model(x), lower(x)) < FLOAT64
        if shortcut == "block":
            assert relative_error(copy.deepcopy(model).merge_and_unload()(x), lower(x)) < FLOAT64


# DoRA


class Mask(nn.Module):
    """A dropout that lets the same entries through every time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(x.numel()).remainder(3).ne(0).view(x.shape)
        return x * kept.to(x) * 1.5


@pytest.mark.quick(case=["2d", "groups"], masked=[True])
@pytest.mark.parametrize("case", ["1d", "2d", "3d", "groups", "dilation", "padded in a circle"])
@pytest.mark.parametrize("masked", [False, True])
def test_dora_scales_each_channel_to_its_norm(case, masked):
    """Of a layer with an earlier one: W x + (m (W + U) / ||W + U|| - W) D(x), by dense kernels."""
    model, x = model_of(case, "DoRA"), images(case)
    first, layer = (model.get_base_model().layers[n].up for n in (0, 1))
    if masked:
        layer.lora_dropout["default"] = Mask()
    base = layer.get_base_layer()
    U = sum(_kernel(own, 1.5) for own in (first, layer))
    norm = (base.weight + U.detach()).flatten(1).norm(dim=1)
    share = (layer.lora_magnitude["default"] / norm).view(-1, *(1 for _ in base.kernel_size))
    kernel = (share.view(-1, *(1 for _ in base.weight.shape[1:])) * (base.weight + U)) - base.weight

    def of(kernel: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return base._conv_forward(x, kernel, None)

    expected = base(x) + of(kernel, Mask()(x) if masked else x)
    found = layer(x)
    assert relative_error(found, expected) < FLOAT64
    names = {"m": layer.lora_magnitude["default"], "A": layer.lora_A["default"].weight}
    names |= {"B": layer.lora_B["default"].weight, "first": first.lora_A["default"].weight}
    found, wanted = (torch.autograd.grad(out.square().sum(), list(names.values())) for out in (found, expected))
    assert_gradients_close(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)))


def _kernel(layer: Any, scaling: float) -> torch.Tensor:
    A, B = (getattr(layer, f"lora_{f}")["default"].weight for f in "AB")
    groups = A.shape[0] // B.shape[1]
    pairs = zip(A.chunk(groups), B.chunk(groups), strict=True)
    return scaling * torch.cat([torch.einsum("or,ri...->oi...", b.flatten(1), a) for a, b in pairs])


@pytest.mark.filterwarnings("ignore:.*has no shortcut at all")
@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "Embedding"])
def test_where_nothing_is_linked_dora_is_that_of_peft(kind):
    torch.manual_seed(0)
    makers = {
        "Conv1d": lambda: nn.Conv1d(4, 6, 3),
        "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=2),
        "Embedding": lambda: nn.Embedding(9, 6),
    }
    layer = makers[kind]()
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["0"], "use_dora": True}
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(**fields))
    ours = get_peft_model(nn.Sequential(copy.deepcopy(layer)), ResLoRAConfig(**fields))
    for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        for own, other in zip(
            *(list(getattr(m.base_model.model[0], name).parameters()) for m in (ours, theirs)), strict=True
        ):
            other.data = torch.randn_like(other)
            own.data = other.data.clone()
    m = theirs.base_model.model[0].lora_magnitude_vector["default"].weight
    assert relative_error(ours.base_model.model[0].lora_magnitude["default"], m.flatten()) < FLOAT64
    m.data *= 1.3
    ours.base_model.model[0].lora_magnitude["default"].data = m.data.flatten().clone()
    shape = {3: (2, 4, 7), 4: (2, 4, 7, 6), 2: (2, 3)}[layer.weight.ndim]
    x = torch.randint(0, 9, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    assert relative_error(ours(x), theirs(x)) < FLOAT64


@pytest.mark.quick(dtype=[torch.bfloat16], shortcut=["block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_cell
def test_half_precision_stays_close(kind, shortcut, dtype):
    model, x = model_of("groups", kind, shortcut), images("groups")
    expected = model(x)
    bound = half_rounding(60, dtype)  # in each of seven layers, a few after each other
    with torch.autocast("cpu", dtype):
        found = model.float()(x.float())
    assert relative_error(found.double(), expected) < bound
    assert relative_error(model.to(dtype)(x.to(dtype)).double(), expected) < bound


@pytest.mark.slow
@every_cell
def test_compiled_whole(kind, shortcut):
    torch._dynamo.reset()
    model, x = model_of("groups", kind, shortcut), images("groups")
    expected = model(x)
    assert relative_error(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected) < FLOAT64
    torch._dynamo.reset()


def test_two_adapters_of_other_kinds_side_by_side():
    model, x = model_of("groups", "AdaLoRA"), images("groups", batch=3)
    model.add_adapter("second", ResLoRAConfig(r=4, target_modules=["up", "down", "step"], nested_ranks=True))
    randomized(model, seed=9)
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    assert relative_error(model.merge_and_unload(adapter_names=["default", "second"])(x), both) < FLOAT64


@pytest.mark.parametrize("kind", ["AdaLoRA", "nested"])
def test_batches_with_several_adapters_are_those_of_each(kind):
    model, x = model_of("groups", kind), images("groups", batch=2)
    expected = model(x)
    mixed = model(x, adapter_names=["default", "__base__"])
    assert relative_error(mixed[:1], expected[:1]) < FLOAT64
    assert relative_error(mixed[1:], net("groups")(x)[1:]) < FLOAT64


@pytest.mark.parametrize("kind", ["AdaLoRA", "nested"])
def test_of_embeddings_such_batches_are_refused(kind):
    base = nn.Sequential(nn.Embedding(9, 6))
    with pytest.warns(UserWarning, match="no shortcut at all"):
        model = get_peft_model(base, ResLoRAConfig(target_modules=["0"], **{"r": 4, **KIND[kind]}))
    with pytest.raises(ValueError, match=r"'default' is no plain LoRA on embedding '0' \(\w+EmbeddingBlock\)"):
        model.eval()(torch.tensor([[1], [2]]), adapter_names=["default", "__base__"])


def test_pruned_embeddings_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Embedding(9, 6, padding_idx=0)), torch.randint(0, 9, (3, 4))
    with pytest.warns(UserWarning, match="no shortcut at all"):
        model = randomized(get_peft_model(copy.deepcopy(base), ResLoRAConfig(target_modules=["0"], **KIND["AdaLoRA"])))
    layer = model.base_model.model[0]
    layer.lora_E["default"].data[1:3] = 0
    model.peft_config["default"].rank_pattern = {"_": 1}
    update_and_allocate(model, 20)
    expected = model(x)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no shortcut at all"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.base_model.model[0].r["default"] == 2
    assert relative_error(loaded(x), expected) < FLOAT64
    assert relative_error(loaded.merge_and_unload()(x), expected) < FLOAT64


# What cannot be computed


@pytest.mark.parametrize(
    ("shortcut", "fields"), [("block", {}), ("middle", {"nested_ranks": True}), ("middle", KIND["AdaLoRA"])]
)
def test_a_chain_of_other_groups_is_refused(shortcut, fields):
    base = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    config = ResLoRAConfig(shortcut=shortcut, chain_cuts=[], target_modules=["0", "1"], **fields)
    with pytest.raises(ValueError, match=r"'0' and '1' are convolutions in 1 and 2 groups.*chain_cuts"):
        get_peft_model(base, config)
    assert type(base[0]) is nn.Conv2d
    get_peft_model(base, ResLoRAConfig(shortcut="middle", chain_cuts=[], target_modules=["0", "1"]))


# A real model


@pytest.mark.quick(kind=["AdaLoRA"])
@pytest.mark.parametrize("kind", KIND)
def test_a_unet_of_diffusers_computes_with_the_sum_of_the_dense_kernels(kind):
    """All of its linear layers and convolutions; output, all gradients, and the merged model."""
    diffusers_models = pytest.importorskip("helpers.diffusers_models")
    name = "UNet2DConditionModel" + diffusers_models.CONVOLVED
    base = diffusers_models.build("UNet2DConditionModel").double().eval()
    inputs = next(diffusers_models.inputs_of(base))
    fields = {"lora_alpha": 6, "target_modules": diffusers_models.targets_of(name, base), "r": 4, **KIND[kind]}
    model = randomized(get_peft_model(copy.deepcopy(base), ResLoRAConfig(**fields))).double().eval()
    layers, weights = tuner_layers(model), dict(base.named_parameters())
    assert {type(layer.get_base_layer()) for layer in layers.values()} == {nn.Linear, nn.Conv2d}
    if kind == "nested":
        set_rank(model, 2)
    rank, s = (2, 3) if kind == "nested" else (4, 6 / (4 + 1e-5) if kind == "AdaLoRA" else 1.5)

    def update(layer: Any) -> torch.Tensor:
        A, B = (getattr(layer, f"lora_{f}")["default"].weight for f in "AB")
        E = layer.lora_E["default"][:, 0] if kind == "AdaLoRA" else torch.ones(4)
        return s * torch.einsum("or,r,ri...->oi...", B.flatten(1)[:, :rank], E[:rank], A[:rank])

    dense = {}
    for own, layer in layers.items():
        W, (chain, n) = weights[f"{own}.weight"].detach(), layer.chain_of("default")
        earlier = [layers[chain.names[k]] for k in range(max(0, n - 1), n + 1)]
        W = W + sum(map(update, earlier))
        if kind == "DoRA":
            layer.lora_magnitude["default"].data = weights[f"{own}.weight"].detach().flatten(1).norm(dim=1) * 1.2
            norm = W.detach().flatten(1).norm(dim=1)
            W = (layer.lora_magnitude["default"] / norm).view(-1, *(1 for _ in W.shape[1:])) * W
        dense[f"{own}.weight"] = W
    assert any(layer.chain_of("default")[1] for layer in layers.values())
    expected, found = torch.func.functional_call(base, dense, (), inputs).sample, model(**inputs).sample
    assert relative_error(found, expected) < MODEL64
    assert relative_error(found, base(**inputs).sample) > 0.01
    trained = {own: p for own, p in model.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad(expected.square().sum(), list(trained.values()), retain_graph=True)
    grads = torch.autograd.grad(found.square().sum(), list(trained.values()))
    assert_gradients_close(dict(zip(trained, grads, strict=True)), dict(zip(trained, wanted, strict=True)))
    assert relative_error(model.merge_and_unload()(**inputs).sample, expected) < MODEL64
