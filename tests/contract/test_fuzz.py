"""Random module trees, configs and adapter operations in random order, against a plain float64 model.

The plain model knows nothing of the library: it gets copies of the factors, finds the chains from names and shapes in
the plainest way, applies the equations of the papers by hooks, and merges by adding dense deltas.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.oracle import relative_error
from helpers.tolerances import rounding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_reslora import MoRAConfig, ResLoRAConfig

WIDTH = 6
BOUND = rounding(30)  # all is float64 but the norms, which are recorded in float32
LEAVES = ["up", "down", "mix"]


class Block(nn.Module):
    def __init__(self, hidden: int, conv1d: bool) -> None:
        super().__init__()
        self.up = Conv1D(hidden, WIDTH) if conv1d else nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mix(torch.tanh(x))
        return x + self.down(torch.tanh(self.up(x)))


class Tree(nn.Module):
    """Stages of blocks in a row; of each stage a path, and of each block its inner width and the kind of `up`."""

    def __init__(self, stages: list[tuple[str, list[tuple[int, bool]]]]) -> None:
        super().__init__()
        self.paths = [path for path, _ in stages]
        for path, blocks in stages:
            parent: nn.Module = self
            *outer, last = path.split(".")
            for part in outer:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.ModuleList(Block(*block) for block in blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for path in self.paths:
            for block in self.get_submodule(path):
                x = block(x)
        return x


blocks = st.lists(st.tuples(st.sampled_from([4, 5]), st.booleans()), min_size=1, max_size=4)
paths = st.sampled_from(["layers", "encoder.layers", "decoder.layers", "stages.0.blocks", "stages.1.blocks"])
trees = st.lists(st.tuples(paths, blocks), min_size=1, max_size=3, unique_by=lambda stage: stage[0]).map(sorted)
targets = st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3, unique=True)
ranks = st.integers(1, 3)


@st.composite
def reslora_fields(draw: st.DrawFn) -> dict[str, Any]:
    shortcut = draw(st.sampled_from(["input", "block", "middle"]))
    return {
        "shortcut": shortcut,
        "pre_num": 1 if shortcut == "input" else draw(st.sampled_from([1, 2, -1])),
        "merge_estimator": draw(st.sampled_from(["input_norm", "weight_norm", "drop"])),
        "norm_window": draw(st.integers(1, 3)),
        "r": draw(ranks),
        "lora_alpha": draw(st.sampled_from([1, 4])),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(LEAVES), ranks, max_size=1)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(LEAVES), st.sampled_from([2, 3]), max_size=1)),
        "target_modules": draw(targets),
    }


mora_fields = st.fixed_dictionaries(
    {
        "r": ranks,
        "mora_type": st.sampled_from(["sharing", "decoupling", "rotation"]),
        "rank_pattern": st.dictionaries(st.sampled_from(LEAVES), ranks, max_size=1),
        "target_modules": targets,
    }
)


def config_of(fields: dict[str, Any]) -> ResLoRAConfig | MoRAConfig:
    return MoRAConfig(**fields) if "mora_type" in fields else ResLoRAConfig(**fields)


@functools.cache
def mora_map(q: int, in_features: int, out_features: int, mora_type: str) -> torch.Tensor:
    """How the dense update `(out, in)` is made of the entries of M `(q, q)`, one by one from Eq. 6 and 9."""
    found = torch.zeros(out_features, in_features, q, q, dtype=torch.float64)
    if mora_type == "sharing":
        for i, p in itertools.product(range(out_features), range(q * math.ceil(in_features / q))):
            found[i, p % in_features, i % q, p % q] += 1
        return found
    groups = min(math.ceil(in_features / q), math.ceil(out_features / q))
    for i, k in itertools.product(range(out_features), range(q)):
        g, row = divmod(i % (groups * q), q)
        weights = {k: 1.0}
        if mora_type == "rotation":  # entry k of the rotated group, as a combination of the group's entries
            half = q // 2
            angle = g * 10000 ** (-2 * (k % half) / q)
            weights = {k: math.cos(angle), (k + half) % q: math.sin(angle) * (-1 if k < half else 1)}
        for entry, weight in weights.items():
            found[i, (g * q + entry) % in_features, row, k] += weight
    return found


def mora_delta(M: torch.Tensor, in_features: int, out_features: int, mora_type: str) -> torch.Tensor:
    return torch.einsum("oirc,rc->oi", mora_map(len(M), in_features, out_features, mora_type), M)


@dataclass
class Adapter:
    """What the plain model knows of an adapter: its fields, copies of its factors, the norms that it should record."""

    fields: dict[str, Any]
    factors: dict[str, tuple[torch.Tensor, ...]]
    shapes: dict[str, tuple[int, int]]
    norms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def is_mora(self) -> bool:
        return "mora_type" in self.fields

    def scaling(self, name: str) -> float:
        leaf, fields = name.rpartition(".")[2], self.fields
        alpha = fields["alpha_pattern"].get(leaf, fields["lora_alpha"])
        r = fields["rank_pattern"].get(leaf, fields["r"])
        return alpha / (math.sqrt(r) if fields["use_rslora"] else r)

    def chains(self) -> list[list[str]]:
        """The layers of one role and shape, in the order of their numbers."""
        chains: dict[Any, list[str]] = {}
        for name in sorted(self.factors, key=lambda name: [int(p) for p in name.split(".")[:-1] if p.isdigit()]):
            chains.setdefault((re.sub(r"\.\d+(?=\.)", "*", name), self.shapes[name]), []).append(name)
        return list(chains.values())

    def earlier(self, chain: list[str], n: int) -> list[str]:
        """The layers that feed layer n, nearest first."""
        pre_num = self.fields["pre_num"]
        return chain[:n][::-1] if pre_num == -1 else chain[max(0, n - pre_num) : n][::-1]

    def update(self, chain: list[str], n: int, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is added to the output of layer n, from the inputs of the chain's layers (Eq. 2 to 4)."""
        name, x = chain[n], seen[chain[n]]
        if self.is_mora:
            return x @ mora_delta(*self.factors[name], *self.shapes[name], self.fields["mora_type"]).T
        A, B = self.factors[name]
        s = self.scaling(name)
        match self.fields["shortcut"]:
            case "input":
                return s * (x + seen[chain[n - 1] if n else name]) @ A.T @ B.T
            case "block":
                pairs = [(*self.factors[k], self.scaling(k)) for k in (name, *self.earlier(chain, n))]
                return sum(s * x @ A.T @ B.T for A, B, s in pairs)
            case _:
                return s * sum(seen[k] @ self.factors[k][0].T for k in (name, *self.earlier(chain, n))) @ B.T

    @property
    def needs_norms(self) -> bool:
        fields = self.fields
        return not self.is_mora and fields["shortcut"] != "block" and fields["merge_estimator"] == "input_norm"

    @property
    def lacks_norms(self) -> bool:
        """Whether the merge lacks its data; layers on their own need none."""
        return self.needs_norms and not self.norms and any(len(chain) > 1 for chain in self.chains())

    def record(self, seen: dict[str, torch.Tensor]) -> None:
        if not self.needs_norms:
            return
        for name, (A, _) in self.factors.items():
            observed = seen[name] if self.fields["shortcut"] == "input" else seen[name] @ A.T
            window = [*self.norms.get(name, []), float(observed.square().mean().sqrt())]
            self.norms[name] = window[-self.fields["norm_window"] :]

    def deltas(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The merged updates `(out, in)` (Eq. 5 to 13); `weights` are the base model's."""
        found = {}
        for chain in self.chains():
            merged_norms: list[float] = []
            for n, name in enumerate(chain):
                found[name] = self._delta(chain, n, merged_norms)
                merged_norms.append(float((weights[name] + found[name]).norm()))
        return found

    def _delta(self, chain: list[str], n: int, merged_norms: list[float]) -> torch.Tensor:
        name = chain[n]
        if self.is_mora:
            return mora_delta(*self.factors[name], *self.shapes[name], self.fields["mora_type"])
        A, B = self.factors[name]
        s, earlier = self.scaling(name), self.earlier(chain, n)
        shortcut, estimator = self.fields["shortcut"], self.fields["merge_estimator"]
        if shortcut == "block":
            return sum(self.scaling(k) * self.factors[k][1] @ self.factors[k][0] for k in (name, *earlier))
        if shortcut == "input" and n == 0:
            return 2 * s * B @ A
        if estimator == "drop":
            return s * B @ A
        if estimator == "input_norm":
            f = {k: sum(window) / len(window) for k, window in self.norms.items()}
            return s * (1 + sum(f[k] / f[name] for k in earlier)) * B @ A
        back = [n - chain.index(k) for k in earlier]
        a = [merged_norms[n - k - 1] / merged_norms[n - 1] if n - k - 1 >= 0 else 1.0 for k in back]
        if shortcut == "input":
            return s * (1 + a[0]) * B @ A
        return s * B @ (A + sum((w * self.factors[k][0] for w, k in zip(a, earlier, strict=True)), 0 * A))


class Plain:
    """The base model, and what the adapters on it should do."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.merged: list[str] = []

    def weights(self) -> dict[str, torch.Tensor]:
        """The base weights in the orientation `(out, in)`."""
        return {
            name: layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            for name, layer in self.base.named_modules()
            if isinstance(layer, (nn.Linear, Conv1D))
        }

    def run(self, x: torch.Tensor, disabled: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The output, and the input of each layer."""
        model = copy.deepcopy(self.base)
        modules = dict(model.named_modules())
        seen: dict[str, torch.Tensor] = {}
        for name in self.weights():
            modules[name].register_forward_hook(lambda _, args, output, name=name: seen.__setitem__(name, args[0]))
        merged = {} if disabled else {name: self.adapters[name].deltas(self.weights()) for name in self.merged}
        for adapter in (self.adapters[name] for name in ([] if disabled else self.active)):
            for chain in adapter.chains():
                if any(chain[0] in deltas for deltas in merged.values()):
                    continue  # as in PEFT: a layer with a merged adapter runs no other
                for n, name in enumerate(chain):
                    modules[name].register_forward_hook(
                        lambda _, args, output, adapter=adapter, chain=chain, n=n: (
                            output + adapter.update(chain, n, seen)
                        )
                    )
        for deltas in merged.values():
            for name, delta in deltas.items():
                weight = modules[name].weight
                weight.data += delta.T if isinstance(modules[name], Conv1D) else delta
        return model(x), seen


class Case:
    """A model under test beside the plain one; each method is an operation on both."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        torch.manual_seed(data.draw(st.integers(0, 2**16), "seed"))
        base = Tree(data.draw(trees, "tree")).double()
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.fields = reslora_fields() if data.draw(st.booleans(), "ResLoRA") else mora_fields
        self.plain = Plain(base)
        fields = data.draw(self.fields, "default")
        self.model = get_peft_model(copy.deepcopy(base), config_of(fields))
        self.plain.active = ["default"]
        self._learn("default", fields)

    def _learn(self, adapter_name: str, fields: dict[str, Any]) -> None:
        """Give a new adapter random factors, and tell the plain model."""
        self.model.eval()
        factors, shapes = {}, {}
        for name, layer in self.model.base_model.model.named_modules():
            for part in ("lora_A", "mora_M"):
                if hasattr(layer, part) and adapter_name in getattr(layer, part):
                    pair = ("lora_A", "lora_B") if part == "lora_A" else ("mora_M",)
                    held = [getattr(layer, p)[adapter_name] for p in pair]
                    parameters = [p.weight if isinstance(p, nn.Module) else p for p in held]
                    for parameter in parameters:
                        nn.init.normal_(parameter, std=0.4)
                    factors[name] = tuple(p.detach().double().clone() for p in parameters)
                    shapes[name] = (layer.in_features, layer.out_features)
        self.plain.adapters[adapter_name] = Adapter(fields, factors, shapes)

    def check(self, disabled: bool = False) -> None:
        x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(self.model(x), self.plain.run(x, disabled)[0]) < BOUND
        if not self.plain.merged:
            for weight, original in zip(self._base_weights(), self.plain.base.parameters(), strict=True):
                assert torch.equal(weight, original)

    def _base_weights(self) -> Iterator[torch.Tensor]:
        inner = self.model.base_model.model
        modules = dict(inner.named_modules())
        for name, _ in self.plain.base.named_parameters():
            owner, _, leaf = name.rpartition(".")
            layer = modules[owner]
            yield getattr(layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer, leaf)

    # the operations

    def add(self) -> None:
        name = next(n for n in ("b", "c", "d", "e", "f", "g", "h", "i", "j") if n not in self.plain.adapters)
        fields = self.data.draw(self.fields, name)
        self.unmerge()
        self.model.add_adapter(name, config_of(fields))
        self._learn(name, fields)

    def set(self) -> None:
        names = self._some()
        self._activate(names)
        self.plain.active, self.plain.merged = names, []

    def _activate(self, names: list[str]) -> None:
        self.model.set_adapter(names[0])
        self.model.base_model.set_adapter(names)  # PEFT takes several here only

    def _some(self) -> list[str]:
        known = sorted(self.plain.adapters)
        return self.data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique=True), "names")

    def delete(self) -> None:
        others = sorted(set(self.plain.adapters) - set(self.plain.active))
        if others:
            self.unmerge()
            name = self.data.draw(st.sampled_from(others), "name")
            self.model.delete_adapter(name)
            del self.plain.adapters[name]

    def merge(self) -> None:
        known = sorted(self.plain.adapters)
        names = self.data.draw(st.none() | st.sampled_from([[name] for name in known]), "names")
        wanted = [name for name in names or self.plain.active if name not in self.plain.merged]
        adapters = [self.plain.adapters[name] for name in wanted]
        if any(adapter.lacks_norms for adapter in adapters):
            with pytest.raises(ValueError, match=r"has no norms recorded on layer .*\. Or set merge_estimator"):
                self.model.merge_adapter(adapter_names=names)
            return
        self.model.merge_adapter(adapter_names=names, safe_merge=self.data.draw(st.booleans(), "safe"))
        self.plain.merged += wanted

    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.plain.merged = []

    def disable(self) -> None:
        with self.model.disable_adapter():
            self.check(disabled=True)
        self.plain.merged = []  # as in PEFT: a forward pass without adapters unmerges

    def train(self) -> None:
        """A training forward, which records norms, and its gradients."""
        x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
        for adapter in self.plain.adapters.values():
            for factor in itertools.chain.from_iterable(adapter.factors.values()):
                factor.requires_grad_()
        output, seen = self.plain.run(x)
        actual = self.model.train()(x)
        self.model.eval()
        assert relative_error(actual, output) < BOUND
        if not self.plain.merged:
            for name in self.plain.active:
                with torch.no_grad():
                    self.plain.adapters[name].record(seen)
            if output.requires_grad:
                output.square().sum().backward()
                actual.square().sum().backward()
                self._check_gradients()
        self.model.zero_grad()
        for adapter in self.plain.adapters.values():
            for factor in itertools.chain.from_iterable(adapter.factors.values()):
                factor.requires_grad_(False).grad = None

    def _check_gradients(self) -> None:
        parameters = dict(self.model.base_model.model.named_parameters())
        for adapter_name in self.plain.active:
            adapter = self.plain.adapters[adapter_name]
            parts = (
                [f"mora_M.{adapter_name}"] if adapter.is_mora else [f"lora_{p}.{adapter_name}.weight" for p in "AB"]
            )
            for name, factors in adapter.factors.items():
                for part, factor in zip(parts, factors, strict=True):
                    actual, scale = parameters[f"{name}.{part}"].grad, float(factor.grad.norm())
                    assert float((actual - factor.grad).norm()) <= BOUND * scale

    def reload(self) -> None:
        self.unmerge()
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            first, *others = self.plain.adapters
            where = {name: Path(folder) if name == "default" else Path(folder, name) for name in self.plain.adapters}
            self.model = PeftModel.from_pretrained(copy.deepcopy(self.plain.base), where[first], adapter_name=first)
            for name in others:
                self.model.load_adapter(where[name], adapter_name=name)
        self._activate(self.plain.active)
        self.model.eval()


OPERATIONS = [Case.add, Case.set, Case.delete, Case.merge, Case.unmerge, Case.disable, Case.train, Case.reload]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_case(data: st.DataObject) -> None:
    with quiet():
        case = Case(data)
        case.check()
        for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), max_size=8), "operations"):
            operation(case)
            case.check()


common = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(common, max_examples=50)
@given(st.data())
def test_random_operations_on_random_models(data):
    run_case(data)


@pytest.mark.slow
@settings(common, max_examples=2000)
@given(st.data())
def test_many_random_operations_on_random_models(data):
    run_case(data)
