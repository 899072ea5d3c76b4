"""AdaLoRA with shortcuts: against the equations in float64, and against PEFT's AdaLoRA where nothing is linked."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from helpers.oracle import randomize_adapters, relative_error
from helpers.tiny_models import TINY_MODELS, output_of
from helpers.tolerances import FLOAT64, MODEL64, half_rounding
from peft import AdaLoraConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from peft_reslora import ResLoRAConfig, calibrate_merge, describe_chains, export_lora, merge_report
from peft_reslora.export.from_files import export_lora_from_files
from peft_reslora.shared.saving import seal
from peft_reslora.training import RankAllocationCallback, anneal_shortcuts, update_and_allocate

pytestmark = pytest.mark.usefixtures("float64")

S = 3 / (4 + 1e-5)
SHORTCUTS = [("input", 1), ("block", 1), ("block", -1), ("middle", 1), ("middle", -1)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.reentrant: bool | None = None

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return SequenceClassifierOutput(loss=None if labels is None else F.mse_loss(x, labels), logits=x)


def config_of(shortcut: str = "block", pre_num: int = 1, **changes) -> ResLoRAConfig:
    fields = {"init_r": 4, "target_r": 2, "total_step": 50, "lora_alpha": 3, "target_modules": ["up", "down"]}
    return ResLoRAConfig(**{**fields, "shortcut": shortcut, "pre_num": pre_num, **changes})


def adapted(base: nn.Module, *args, **changes) -> nn.Module:
    """With values of an adapter that has been trained; a direction is pruned in one layer."""
    return randomize_adapters(get_peft_model(copy.deepcopy(base), config_of(*args, **changes)))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}


def oracle(base: Net, values: dict[str, torch.Tensor], x: torch.Tensor, shortcut: str, pre_num: int) -> torch.Tensor:
    """Eq. 2 to 4 of ResLoRA with s B E A, every product written out."""
    seen: dict[str, list[torch.Tensor]] = {"up": [], "down": []}

    def linear(n: int, name: str, x: torch.Tensor) -> torch.Tensor:
        layer, inputs = base.layers[n].get_submodule(name), seen[name]
        inputs.append(x)
        first = 0 if pre_num == -1 else max(0, n - pre_num)

        def factor(k: int, letter: str) -> torch.Tensor:
            suffix = "" if letter == "E" else ".weight"
            return values[f"layers.{k}.{name}.lora_{letter}.default{suffix}"]

        def last(k: int, hidden: torch.Tensor) -> torch.Tensor:
            return S * torch.einsum("or,r,...r->...o", factor(k, "B"), factor(k, "E")[:, 0], hidden)

        if shortcut == "input":
            update = last(n, (x + inputs[max(0, n - 1)]) @ factor(n, "A").T)
        elif shortcut == "block":
            update = sum(last(k, x @ factor(k, "A").T) for k in range(first, n + 1))
        else:
            update = last(n, sum(inputs[k] @ factor(k, "A").T for k in range(first, n + 1)))
        return F.linear(x, layer.weight, layer.bias) + update

    for n in range(len(base.layers)):
        x = x + linear(n, "down", torch.tanh(linear(n, "up", x)))
    return x


def leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in trained(model).items()}


def gradients(output: torch.Tensor, of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(of, torch.autograd.grad(output.square().sum(), list(of.values())), strict=True))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < FLOAT64, name


@pytest.fixture
def base() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_output_and_gradients_are_those_of_the_equation(base, x, shortcut, pre_num, reentrant):
    model = adapted(base, shortcut, pre_num)
    values = leaves(model)
    assert len(values) == 24
    expected = oracle(base, values, x, shortcut, pre_num)
    model.base_model.model.reentrant = reentrant
    found = model(x.clone().requires_grad_()).logits  # without which a re-entrant region has no gradients
    assert relative_error(found, expected) < FLOAT64
    found.square().sum().backward()  # re-entrant checkpointing takes no other
    assert_same({name: p.grad for name, p in trained(model).items()}, gradients(expected, values))


def test_a_chain_that_is_summed_up_in_long_inputs_is_the_same(base):
    x = torch.randn(200, 5)
    model = adapted(base, "block", -1)
    values = leaves(model)
    expected, found = oracle(base, values, x, "block", -1), model(x).logits
    assert relative_error(found, expected) < FLOAT64
    found.square().sum().backward()
    assert_same({name: p.grad for name, p in trained(model).items()}, gradients(expected, values))


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_factors_that_hooks_load_are_the_same(base, x, shortcut, pre_num):
    """As under offloading and FSDP1, where only a call of the modules of A and B multiplies by them."""
    model = adapted(base, shortcut, pre_num)
    expected = oracle(base, leaves(model), x, shortcut, pre_num)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_pre_hook(lambda module, args: None)
    assert relative_error(model(x).logits, expected) < FLOAT64


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_a_new_adapter_changes_nothing_and_starts_as_in_peft(base, x, shortcut, pre_num):
    model = get_peft_model(copy.deepcopy(base), config_of(shortcut, pre_num, init_r=200, target_r=8))
    assert relative_error(model(x).logits, base(x).logits) < FLOAT64
    for name, parameter in trained(model).items():
        if "lora_E" in name:
            assert not parameter.any()
            assert parameter.shape == (200, 1)
        else:
            assert 0.018 < parameter.std() < 0.022, name
            assert abs(parameter.mean()) < 0.005, name
    assert not trained(get_peft_model(copy.deepcopy(base), config_of(shortcut, pre_num, inference_mode=True)))
    loud = get_peft_model(copy.deepcopy(base), config_of(shortcut, pre_num, init_lora_weights=False, init_r=200))
    assert all(0.8 < parameter.std() < 1.2 for parameter in trained(loud).values())


def test_scaling_is_fixed_by_init_r(base):
    layer = adapted(base).base_model.model.layers[0].up
    assert layer.scaling["default"] == S
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == S / 2
    layer.unscale_layer()
    assert layer.scaling["default"] == S


# Against PEFT's AdaLoRA


@pytest.mark.filterwarnings("ignore:.*no shortcut at all:UserWarning")
@pytest.mark.parametrize("tinit", [0, 7])
def test_where_nothing_is_linked_it_is_the_adalora_of_peft_step_by_step(base, tinit):
    """50 steps of training with allocation; every layer has a shape of its own, so that no chain has two."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(n, n + 1) for n in range(4, 9)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
            logits = torch.tanh(self.net(x))
            return SequenceClassifierOutput(loss=F.mse_loss(logits, labels), logits=logits)

    schedule = {"init_r": 6, "target_r": 2, "tinit": tinit, "tfinal": 10, "deltaT": 3, "total_step": 45}
    schedule |= {"lora_alpha": 5, "orth_reg_weight": 0.1, "beta1": 0.8, "beta2": 0.7, "lora_dropout": 0.0}
    targets = [f"net.{n}" for n in range(5)]
    theirs = get_peft_model(Model(), AdaLoraConfig(**schedule, target_modules=targets))
    ours = get_peft_model(Model(), ResLoRAConfig(**schedule, target_modules=targets))
    values = {name.removesuffix(".weight"): p for name, p in trained(ours).items()}
    with torch.no_grad():
        for name, parameter in trained(theirs).items():
            values[name].copy_(parameter)
    optimizers = [torch.optim.Adam(trained(model).values(), lr=0.05) for model in (theirs, ours)]
    generator = torch.Generator().manual_seed(2)
    pruned = []
    for step in range(50):
        x, y = (torch.randn(16, n, generator=generator) for n in (4, 9))
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            # Without a task_type, PEFT's own model (0.21.2) calls the base past its tuner, and has no such term.
            output = model.base_model(x, labels=y)
            output.loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(output.loss)
        assert relative_error(losses[1], losses[0]) < 1e-6, step
        for name, parameter in trained(theirs).items():
            assert torch.equal(values[name] == 0, parameter == 0), (step, name)
            assert not parameter.any() or relative_error(values[name], parameter) < 1e-6, (step, name)
        pruned.append(sum(int((p == 0).sum()) for name, p in values.items() if "lora_E" in name))
    assert pruned[-1] == 5 * 6 - 5 * 2
    assert len(set(pruned)) > 5  # a budget that shrank step by step
    masks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_E.default"): sum(mask)
        for name, mask in theirs.peft_config["default"].rank_pattern.items()
    }
    ranks = ours.peft_config["default"].rank_pattern
    assert ranks == {f"^{name}".replace(".", r"\."): max(1, rank) for name, rank in masks.items()}
    for n in range(5):
        found, delta = (m.base_model.model.net[n].get_delta_weight("default").detach() for m in (ours, theirs))
        assert torch.allclose(found, delta, rtol=1e-6, atol=1e-12)


def test_the_loss_has_the_orthogonality_term_while_gradients_are_recorded(base, x):
    model = adapted(base, orth_reg_weight=0.3)
    terms = []
    for name, p in trained(model).items():
        if "lora_E" not in name:
            square = p @ p.T if "lora_A" in name else p.T @ p
            terms.append((square - torch.eye(4)).square().sum().sqrt())
    plain = F.mse_loss(model(x).logits, x)
    expected = plain + 0.3 * sum(terms) / len(terms)
    assert relative_error(model(x, labels=x).loss, expected) < FLOAT64
    assert relative_error(model.base_model(x, labels=x).loss, expected) < FLOAT64
    wanted = torch.autograd.grad(expected, list(trained(model).values()))
    found = torch.autograd.grad(model(x, labels=x).loss, list(trained(model).values()))
    assert_same(dict(enumerate(found)), dict(enumerate(wanted)))
    with torch.no_grad():
        assert relative_error(model(x, labels=x).loss, plain) < FLOAT64
    with model.disable_adapter():
        assert relative_error(model(x, labels=x).loss, F.mse_loss(base(x).logits, x)) < FLOAT64
    merged = model.merge_and_unload()
    assert relative_error(merged(x, labels=x).loss, plain) < FLOAT64


# Importance


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_importance_counts_every_layer_that_uses_a_direction(base, x, shortcut, pre_num):
    """|w dL/dw| and what follows from it, from the gradients of the oracle, in which each use is written out."""
    model = adapted(base, shortcut, pre_num, tinit=40)
    values = leaves(model)
    whole = gradients(oracle(base, values, x, shortcut, pre_num), values)
    model(x).logits.square().sum().backward()
    update_and_allocate(model, 1)
    chains = [place[0] for place in [_layer(model, 0, name).chain_of("default") for name in ("up", "down")]]
    allocator = chains[0].allocation._allocator
    assert chains[1].allocation is chains[0].allocation
    layers = [name for chain in chains for name in chain.names]
    for key, found in allocator.ipt.items():
        n, part, _ = key.split(".")
        name = f"{layers[int(n)]}.{part}.default" + ("" if part == "lora_E" else ".weight")
        assert relative_error(found, (values[name] * whole[name]).abs()) < FLOAT64, name
    if shortcut == "block":
        alone = _gradient_of_own_use(base, values, x, pre_num)
        assert relative_error(whole["layers.0.up.lora_E.default"], alone) > 0.01


def _gradient_of_own_use(base: Net, values: dict[str, torch.Tensor], x: torch.Tensor, pre_num: int) -> torch.Tensor:
    """dL/dE of a layer, if the later layers that use it did not count."""
    name = "layers.0.up.lora_E.default"
    own = values[name].detach().clone().requires_grad_()
    constant = {key: value.detach() for key, value in values.items()}
    A, B = (constant[f"layers.0.up.lora_{letter}.default.weight"] for letter in "AB")
    changed = copy.deepcopy(base)
    up = changed.layers[0].up
    bias = up.bias
    del up.bias
    up.bias = bias + S * (x @ A.T * (own - own.detach())[:, 0]) @ B.T  # of the value that it had
    return torch.autograd.grad(oracle(changed, constant, x, "block", pre_num).square().sum(), own)[0]


def _layer(model: nn.Module, n: int, name: str) -> nn.Module:
    return model.base_model.model.layers[n].get_submodule(name)


# Pruned directions: saved, loaded, merged, exported


def allocate(model: nn.Module, x: torch.Tensor, steps: int = 12) -> nn.Module:
    """A short training, to the end of the schedule."""
    optimizer = torch.optim.Adam(trained(model).values(), lr=0.02)
    for step in range(1, steps + 1):
        model(x, labels=torch.ones_like(x)).loss.backward()
        optimizer.step()
        update_and_allocate(model, step)
        optimizer.zero_grad()
    return model


def schedule(**changes) -> dict:
    return {"total_step": 12, "tfinal": 2, "init_r": 4, "target_r": 1, **changes}


@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_pruned_directions_are_not_saved_and_the_rest_is_as_before(base, x, shortcut, pre_num, tmp_path):
    model = allocate(get_peft_model(copy.deepcopy(base), config_of(shortcut, pre_num, **schedule())), x)
    expected = model(x).logits.detach()
    values = leaves(model)
    assert relative_error(expected, oracle(base, values, x, shortcut, pre_num) * (S / (3 / (4 + 1e-5)))) < FLOAT64
    model.save_pretrained(tmp_path)
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    nonzero = {name.split(".lora_E")[0]: values[name][:, 0] != 0 for name in values if "lora_E" in name}
    assert sum(int(mask.sum()) for mask in nonzero.values()) == 8
    for name, mask in nonzero.items():
        kept = mask if shortcut != "middle" else _any_in_chain(nonzero, name)
        numbers = kept.nonzero().flatten() if kept.any() else torch.tensor([0])
        assert ranks["^" + name.replace(".", r"\.")] == len(numbers)
        assert torch.equal(
            saved[f"base_model.model.{name}.lora_A.weight"], values[f"{name}.lora_A.default.weight"][numbers]
        )
        assert torch.equal(
            saved[f"base_model.model.{name}.lora_B.weight"], values[f"{name}.lora_B.default.weight"][:, numbers]
        )
        assert torch.equal(saved[f"base_model.model.{name}.lora_E"], values[f"{name}.lora_E.default"][numbers])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(loaded(x).logits, expected) < FLOAT64
    assert _layer(loaded, 1, "up").scaling == {"default": S}
    assert relative_error(model(x).logits, expected) < FLOAT64  # saving has changed nothing
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[key]) for key, tensor in again.items())


def _count(model: nn.Module) -> int:
    """How many directions are not pruned."""
    return sum(int((p != 0).sum()) for name, p in trained(model).items() if "lora_E" in name)


def _any_in_chain(nonzero: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    role = name.rpartition(".")[2]
    return torch.stack([mask for other, mask in nonzero.items() if other.endswith(role)]).any(dim=0)


@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_a_layer_without_any_direction_is_saved_with_one_that_is_zero(base, x, shortcut, tmp_path):
    model = allocate(get_peft_model(copy.deepcopy(base), config_of(shortcut, **schedule())), x)
    chain, _ = _layer(model, 1, "up").chain_of("default")
    for n in range(4) if shortcut == "middle" else (1,):
        E = _layer(model, n, "up").lora_E["default"]
        E.data.zero_()
        chain.allocation.kept[f"layers.{n}.up"][:] = False
    expected = model(x).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert relative_error(loaded(x).logits, expected) < FLOAT64
    layer = _layer(loaded, 1, "up")
    assert layer.r["default"] == 1
    assert not layer.lora_E["default"].any()
    optimizer = torch.optim.Adam(trained(loaded).values())
    loaded(x, labels=x).loss.backward()
    optimizer.step()
    assert layer.lora_E["default"].any()
    update_and_allocate(loaded, 1)
    assert not layer.lora_E["default"].any()  # what was pruned stays so
    assert _count(loaded) == _count(model)


def test_before_the_schedule_is_over_everything_is_saved(base, x, tmp_path):
    model = allocate(get_peft_model(copy.deepcopy(base), config_of(**schedule())), x, steps=8)
    values = leaves(model)
    assert any((value == 0).any() for name, value in values.items() if "lora_E" in name)  # pruned for now
    model.save_pretrained(tmp_path)
    assert all(len(t) == 4 for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_E" in k)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert relative_error(loaded(x).logits, model(x).logits) < FLOAT64
    for step in (9, 10):
        loaded(x, labels=x).loss.backward()
        update_and_allocate(loaded, step)
    assert loaded.peft_config["default"].rank_pattern


@pytest.mark.parametrize("shortcut", ["block", "middle"])
def test_a_pruned_checkpoint_loads_into_a_model_of_the_first_rank_and_back(base, x, shortcut, tmp_path):
    """As when Trainer loads its best checkpoint at the end."""
    model = get_peft_model(copy.deepcopy(base), config_of(shortcut, **schedule()))
    randomize_adapters(model).save_pretrained(tmp_path / "first")
    first = model(x).logits.detach()
    allocate(model, x).save_pretrained(tmp_path / "last")
    last = model(x).logits.detach()
    model.load_adapter(tmp_path / "last", "default")
    assert relative_error(model(x).logits, last) < FLOAT64
    assert _layer(model, 0, "up").lora_A["default"].out_features == _layer(model, 0, "up").r["default"]
    model.load_adapter(tmp_path / "first", "default")
    assert relative_error(model(x).logits, first) < FLOAT64
    assert model.peft_config["default"].rank_pattern == {}
    before = {name: p.clone() for name, p in trained(model).items()}
    broken = load_file(tmp_path / "last" / "adapter_model.safetensors")
    del broken["base_model.model.layers.2.up.lora_E"]
    with pytest.raises(ValueError, match=r"1 missing: layers\.2\.up\.lora_E"):
        set_peft_model_state_dict(model, broken)
    assert all(torch.equal(p, before[name]) for name, p in trained(model).items())
    assert model.peft_config["default"].rank_pattern == {}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("shortcut", "pre_num"), [("block", -1), ("block", 1)])
def test_it_merges_and_exports_exactly(name, shortcut, pre_num, tmp_path):
    torch.manual_seed(0)
    tiny = TINY_MODELS[name]
    plain, inputs = tiny.make().double(), tiny.inputs()
    model = adapted(plain, shortcut, pre_num, target_modules=tiny.targets).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_E" in parameter_name:
                first = name == "llama" and ".0.self_attn" in parameter_name
                parameter[0 if first else 2 :] = 0.0  # rank 0 in a whole layer
    expected, before = output_of(model, inputs).detach(), output_of(plain.eval(), inputs).detach()
    assert relative_error(expected, before) > 0.01
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert relative_error(output_of(loaded, inputs), expected) < MODEL64
    for export in (export_lora(model), export_lora_from_files(tmp_path)):
        assert all(layer.exact for layer in export.report.layers)
        assert min(layer.rank_after for layer in export.report.layers) == (0 if name == "llama" else 2)
        assert max(layer.rank_after for layer in export.report.layers) <= 2 * len(_longest_chain(model, pre_num))
        export.save_pretrained(tmp_path / "lora")
        lora = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
        assert relative_error(output_of(lora, inputs), expected) < 1e-5  # saved in float32
    weights = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    model.merge_adapter()
    assert relative_error(output_of(model, inputs), expected) < MODEL64
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if "base_layer" in n)
    assert relative_error(output_of(model.merge_and_unload(safe_merge=True), inputs), expected) < MODEL64


def _longest_chain(model: nn.Module, pre_num: int) -> range:
    longest = max(len(chain) for chain in describe_chains(model).chains)
    return range(longest if pre_num == -1 else min(longest, pre_num + 1))


@pytest.mark.parametrize("shortcut", ["input", "middle"])
@pytest.mark.parametrize("estimator", ["input_norm", "weight_norm", "least_squares", "drop"])
def test_estimated_merges_are_those_of_a_lora_with_b_times_e(base, x, shortcut, estimator, tmp_path):
    model = adapted(base, shortcut)
    model.train()(x)
    plain = get_peft_model(
        copy.deepcopy(base),
        ResLoRAConfig(r=4, lora_alpha=4, target_modules=["up", "down"], shortcut=shortcut, pre_num=1),
    )
    with torch.no_grad():
        values = trained(model)
        for name, parameter in trained(plain).items():
            value = values[name].clone()
            if "lora_B" in name:
                value = value * values[name.replace("lora_B", "lora_E").removesuffix(".weight")].T * S
            parameter.copy_(value)
    plain.train()(x)
    batches = [{"x": torch.randn(8, 5)} for _ in range(4)]
    for one in (model.eval(), plain.eval()):
        one.peft_config["default"].merge_estimator = estimator
        if estimator == "least_squares":
            calibrate_merge(one, batches, ridge=1e-3)
    assert relative_error(model(x).logits, plain(x).logits) < FLOAT64
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    own, other = (list(merge_report(one, batches).costs[estimator].layers.values()) for one in (model, plain))
    assert own == pytest.approx(other, rel=1e-6)
    expected = plain.merge_and_unload()(x).logits
    assert relative_error(loaded.merge_and_unload()(x).logits, expected) < 1e-6  # C_n is kept in float32
    assert relative_error(model.merge_and_unload()(x).logits, expected) < 1e-6


@pytest.mark.parametrize("shortcut", ["input", "middle"])
def test_it_can_be_annealed_and_pruned(base, x, shortcut, tmp_path):
    config = config_of(shortcut, merge_estimator="weight_norm", **schedule())
    model = allocate(get_peft_model(copy.deepcopy(base), config), x)
    anneal_shortcuts(model, 1.0)
    expected = model(x).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(loaded(x).logits, expected) < 1e-6  # E_n is kept in float32
    assert relative_error(loaded.merge_and_unload()(x).logits, expected) < 1e-6


# Training loops


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        x = torch.randn(5, generator=torch.Generator().manual_seed(n))
        return {"x": x, "labels": torch.ones(5)}


def trainer_of(model: nn.Module, folder, callbacks: list, **arguments) -> Trainer:
    fields = {"max_steps": 12, "per_device_train_batch_size": 4, "report_to": [], "learning_rate": 0.02}
    fields |= {"use_cpu": True, "save_strategy": "no", "label_names": ["labels"], "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), **{**fields, **arguments})
    return Trainer(model, arguments, train_dataset=Data(), callbacks=callbacks)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_trainer_allocates_with_the_callback(base, tmp_path, shortcut, accumulate):
    model = get_peft_model(copy.deepcopy(base), config_of(shortcut, **schedule()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no ranks were allocated")
        trainer_of(model, tmp_path, [RankAllocationCallback()], gradient_accumulation_steps=accumulate).train()
    assert _count(model) == 8
    assert len(model.peft_config["default"].rank_pattern) == 8


def test_trainer_without_the_callback_warns_after_delta_t_steps(base, tmp_path):
    model = get_peft_model(copy.deepcopy(base), config_of(**schedule(deltaT=3)))
    trainer_of(model, tmp_path, [], max_steps=3).train()
    with pytest.warns(UserWarning, match=r"'default' was trained for 3 steps.*RankAllocationCallback\(\)") as caught:
        trainer_of(model, tmp_path, []).train()
    assert sum("no ranks were allocated" in str(warning.message) for warning in caught) == 1


def test_a_run_that_is_too_short_for_the_schedule_warns(base, tmp_path):
    model = get_peft_model(copy.deepcopy(base), config_of(**schedule()))
    with pytest.warns(UserWarning, match=r"has 5 steps, and the ranks .* are final after 10 .*Set total_step to 5"):
        trainer_of(model, tmp_path, [RankAllocationCallback()], max_steps=5).train()
    assert model.peft_config["default"].rank_pattern == {}


@pytest.mark.parametrize(("saved", "optim"), [(5, "adamw_torch"), (10, "adamw_torch"), (5, "adafactor")])
def test_a_run_is_resumed(base, tmp_path, saved, optim):
    """Before ranks are allocated, and after: then the checkpoint has fewer directions than the optimizer's state."""

    def start() -> nn.Module:
        return get_peft_model(copy.deepcopy(base), config_of(**schedule()))

    arguments = {"save_strategy": "steps", "save_steps": saved, "optim": optim}
    trainer_of(start(), tmp_path, [RankAllocationCallback()], **arguments).train()
    resumed = trainer_of(start(), tmp_path / "resumed", [RankAllocationCallback()], optim=optim)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert any("begins anew" in str(warning.message) for warning in caught) == (saved == 10)
    assert resumed.state.global_step == 12
    assert _count(resumed.model) == 8
    assert len(resumed.model.peft_config["default"].rank_pattern) == 8


def test_without_a_tuner_the_same_is_computed(base, x):
    """`inject_adapter_in_model` leaves no tuner, where PEFT's AdaLoRA keeps its allocator."""
    tuned = adapted(base, **schedule())
    injected = randomize_adapters(inject_adapter_in_model(config_of(**schedule()), copy.deepcopy(base)))
    allocate(tuned, x)
    allocate(injected, x)
    found, expected = trained(injected), trained(tuned)
    assert found.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in found.items())
    assert any((p == 0).any() for p in found.values())


def test_a_copy_allocates_for_itself(base, x):
    model = allocate(adapted(base, **schedule()), x, steps=5)
    twin = copy.deepcopy(model)
    one, other = (_layer(m, 0, "up").chain_of("default")[0].allocation for m in (model, twin))
    assert one is not other
    assert one is _layer(model, 0, "down").chain_of("default")[0].allocation
    for m in (model, twin):
        for step in range(6, 12):
            m(x, labels=x).loss.backward()
            update_and_allocate(m, step)
    assert all(torch.equal(p, trained(twin)[name]) for name, p in trained(model).items())


def test_steps_that_overflowed_count_for_nothing(base, x):
    model = adapted(base, **schedule())
    model(x, labels=x).loss.backward()
    trained(model)["layers.0.up.lora_E.default"].grad.fill_(torch.inf)
    update_and_allocate(model, 1)
    allocator = _layer(model, 0, "up").chain_of("default")[0].allocation._allocator
    assert all(score.isfinite().all() for score in allocator.exp_avg_ipt.values())


def test_calls_at_the_wrong_time_are_refused(base, x):
    model = adapted(base, **schedule())
    with pytest.raises(RuntimeError, match=r"no gradients.*before optimizer.zero_grad"):
        update_and_allocate(model, 1)
    model(x, labels=x).loss.backward()
    with pytest.raises(RuntimeError, match=r"update_and_allocate\(10\) is the first call"):
        update_and_allocate(model, 10)
    plain = get_peft_model(copy.deepcopy(base), ResLoRAConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=r"no AdaLoRA to train.*total_step"):
        update_and_allocate(plain, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shortcut", "pre_num"), SHORTCUTS)
def test_under_autocast_it_stays_close(base, x, shortcut, pre_num, dtype):
    model, expected = adapted(base, shortcut, pre_num).float(), adapted(base, shortcut, pre_num)(x).logits
    with torch.autocast("cpu", dtype):
        assert relative_error(model(x.float()).logits.double(), expected) < half_rounding(40, dtype)


def test_a_model_on_which_parameters_are_offloaded_is_the_same(base, x):
    for shortcut, pre_num in SHORTCUTS:
        model = adapted(base, shortcut, pre_num)
        expected = model(x).logits.detach()
        offloaded = cpu_offload(model, torch.device("cpu"))
        assert all(parameter.is_meta for parameter in trained(offloaded).values())
        with torch.no_grad():
            assert relative_error(offloaded(x).logits, expected) < FLOAT64


# Refusals


def test_sharded_factors_are_refused(base, x, monkeypatch):
    """As ZeRO-3 leaves them outside of a layer's own forward."""
    model = adapted(base)
    model(x, labels=x).loss.backward()
    with monkeypatch.context() as patch:
        patch.setattr("peft_reslora.reslora.rank_allocation.deepspeed_config", dict)
        with pytest.raises(RuntimeError, match=r"'default' has AdaLoRA.*DeepSpeed.*Use DDP"):
            update_and_allocate(model, 1)
    E = _layer(model, 2, "up").lora_E
    E["default"] = nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match=r"layer 'layers\.2\.up' are sharded.*Train without sharding \(DDP\)"):
        update_and_allocate(model, 1)
    with pytest.raises(RuntimeError, match=r"layer 'layers\.2\.up' are sharded.*without total_step"):
        model(x)
    _layer(model, 2, "up").lora_A["default"].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(RuntimeError, match=r"layer 'layers\.2\.up' are sharded"):
        model(x, labels=x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True, which are two kinds of blocks"),
        ({"use_rslora": True}, "use_rslora=True, but its scaling is"),
        ({"r": 16}, "r=16 with total_step=50 .*init_r=4"),
        ({"target_r": 4}, "target_r=4 must be less than init_r=4"),
        ({"target_r": 0}, "target_r=0 must be a positive integer"),
        ({"init_r": 2.5}, "init_r=2.5 must be a positive integer"),
        ({"tinit": 30, "tfinal": 20}, "tinit=30 and tfinal=20 leave no step of total_step=50"),
        ({"tinit": -1}, "tinit=-1 must be an integer that is not negative"),
        ({"deltaT": 0}, "deltaT=0 must be a positive integer"),
        ({"beta1": 1.0}, "beta1=1.0 must be a number between 0 and 1"),
        ({"beta2": 0}, "beta2=0 must be a number between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1 must be a number that is not negative"),
        ({"total_step": 0}, "total_step=0 must be a positive integer"),
        ({"total_step": None}, "target_r=2 is a field of AdaLoRA, which total_step chooses"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be positive"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' with total_step=50"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' with total_step=50"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(**fields)


def test_fields_and_defaults_are_those_of_peft():
    ours, theirs = ResLoRAConfig(total_step=100), AdaLoraConfig(total_step=100)
    for name in ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.r == 12


def test_ranks_of_a_finished_training_begin_no_other(base, x):
    config = config_of(**schedule())
    model = allocate(get_peft_model(copy.deepcopy(base), config), x)
    assert config.rank_pattern == {}  # the adapter has a config of its own
    config.rank_pattern = model.peft_config["default"].rank_pattern
    fresh = copy.deepcopy(base)
    with pytest.raises(ValueError, match=r"rank_pattern=.*still to be allocated.*config\.rank_pattern = \{\}"):
        get_peft_model(fresh, config)
    assert fresh.state_dict().keys() == base.state_dict().keys()
    config.rank_pattern = {}
    get_peft_model(fresh, config)


def test_weighted_adapters_are_refused(base):
    model = adapted(base)
    with pytest.raises(ValueError, match=r"Adapter 'default' has AdaLoRA.*save_as_lora"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="cat")
    assert list(model.peft_config) == ["default"]


def test_files_without_their_singular_values_are_refused(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.layers.2.up.lora_E"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    seal(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: layers\.2\.up\.lora_E"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with pytest.raises(ValueError, match=r"lora_E of layer 'layers\.2\.up' is missing"):
        export_lora_from_files(tmp_path)


@pytest.mark.slow
def test_compiled_it_is_the_same(base, x):
    torch._dynamo.reset()
    model = adapted(base)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    assert relative_error(compiled(x).logits, model(x).logits) < FLOAT64
    torch._dynamo.reset()


def trained_by_hand(model: nn.Module, x: torch.Tensor, steps: int = 8) -> nn.Module:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        model(x, labels=x).loss.backward()
        optimizer.step()
        update_and_allocate(model, step)
        optimizer.zero_grad()
    return model


def short(**changes) -> ResLoRAConfig:
    return config_of(**{"total_step": 8, "tinit": 0, "tfinal": 3, **changes})


def test_a_config_that_is_used_twice_trains_both_adapters(base, x):
    config = short()
    first, second = (get_peft_model(copy.deepcopy(base), config) for _ in range(2))
    for model in (first, second):
        assert any(E.any() for name, E in trained(trained_by_hand(model, x)).items() if "lora_E" in name)
    assert config.rank_pattern == {}
    first.add_adapter("again", config)
    first.set_adapter("again")
    trained_by_hand(first, x)
    assert any(E.any() for name, E in trained(first).items() if "lora_E.again" in name)


def test_a_new_adapter_with_the_config_of_a_saved_one_is_refused(base, x, tmp_path):
    trained_by_hand(get_peft_model(copy.deepcopy(base), short()), x).save_pretrained(tmp_path)
    config = ResLoRAConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(RuntimeError, match="no adapter that has them was loaded"):
        trained_by_hand(model, x)


@pytest.mark.parametrize("saved", [5, 6, 7])
def test_a_run_with_middle_is_resumed_after_its_ranks_were_allocated(base, tmp_path, saved):
    def start() -> nn.Module:
        return get_peft_model(copy.deepcopy(base), config_of("middle", total_step=8, tinit=0, tfinal=3))

    trainer = trainer_of(
        start(), tmp_path, [RankAllocationCallback()], save_strategy="steps", save_steps=1, max_steps=8
    )
    trainer.train()
    resumed = trainer_of(start(), tmp_path / "resumed", [RankAllocationCallback()], max_steps=8)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert resumed.state.global_step == 8
    assert _count(resumed.model) <= 2 * 8


def test_gradients_that_were_set_to_zero_are_none(base, x):
    model = get_peft_model(copy.deepcopy(base), short())
    model(x, labels=x).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)
    with pytest.raises(RuntimeError, match=r"found no gradients.*before optimizer\.zero_grad"):
        update_and_allocate(model, 1)
