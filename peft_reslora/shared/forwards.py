"""What forwards do to linear layers: who reads a layer's weight instead of calling it, who computes something else.

An adapter lives in the forward of its layer. Where another module computes with the layer's weight, the adapter takes
no part, without any error: so the source of the forwards is read before a layer is adapted.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# What may be asked of a weight without computing with it.
_HARMLESS_ATTRIBUTES = {"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "size", "numel"}
_HARMLESS_CALLS = {"isinstance", "hasattr", "getattr", "type", "id"}


def _slow_but_exact(module: Any) -> bool:
    return module.pretraining_tp > 1 and module.slow_but_exact


def _fast_path(module: Any) -> bool:
    return torch.backends.mha.get_fastpath_enabled()


# Modules that read a weight or call the layer, and when they read (transformers 5.23, torch 2.13).
_READS_ONLY_IF: dict[str, Callable[[Any], bool]] = {
    "TransformerEncoder": _fast_path,
    "TransformerEncoderLayer": _fast_path,
    "BloomAttention": _slow_but_exact,
    "BloomMLP": _slow_but_exact,
    "DisentangledSelfAttention": lambda module: False,  # with `query_states`, which DeBERTa's encoder is never given
}


def reader_of(name: str, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """The module above the layer `name` whose forward computes with its weight, or None.

    Args:
        name: the layer's name in the model.
        modules: all modules of the model by name.
    """
    parts = name.split(".")
    for i in range(len(parts) - 1, -1, -1):
        above = modules.get(".".join(parts[:i]))
        if above is None:
            continue
        path = ".".join("*" if part.isdigit() else part for part in parts[i:])
        kind: type = type(above)
        processor: type = type(getattr(above, "processor", None))  # what diffusers' attention computes with
        read = weights_read(kind, _own_forward(above)) | _weights_read_by_processor(processor)
        if path in read and _reads(above):
            return above
    return None


def _reads(module: nn.Module) -> bool:
    conditions = (_READS_ONLY_IF.get(kind.__name__) for kind in type(module).__mro__)
    return all(condition(module) for condition in conditions if condition is not None)


def _own_forward(module: nn.Module) -> CodeType | None:
    """The forward that fused kernels, or others, have set on the module itself; those of accelerate's hooks and of
    other wrappers are looked through."""
    return _code_of(vars(module).get("forward"))


def _code_of(function: Any) -> CodeType | None:
    """Code, unlike a function, holds no module alive."""
    unwrapped = inspect.unwrap(function) if callable(function) else None
    return getattr(getattr(unwrapped, "__func__", unwrapped), "__code__", None)


@lru_cache(maxsize=1024)
def weights_read(kind: type, own_forward: CodeType | None = None) -> frozenset[str]:
    """The layers below a module of class `kind` with whose `weight` its forward computes, such as 'out_proj' or
    'layers.*'; also in the methods that the forward calls. `own_forward` takes the place of the class's."""
    found: set[str] = set()
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        for code in [own_forward] if own_forward and name == "forward" else _definitions(kind, name):
            if code not in seen:
                seen.add(code)
                names = set(_names_in(code))
                todo += names
                if "weight" in names:
                    found.update(_weights_read_in(code))
    return frozenset(found)


@lru_cache(maxsize=1024)
def _weights_read_by_processor(kind: type) -> frozenset[str]:
    call = _code_of(kind.__call__)
    return frozenset(_weights_read_in(call, argument=1) if call else ())


def _definitions(kind: type, name: str) -> Iterator[CodeType]:
    """The method `name` of a class, and those above that it may reach by `super`; not those of `nn.Module`."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if code := _code_of(vars(base).get(name)):
            yield code
            if "super" not in code.co_names:
                return


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _weights_read_in(code: CodeType, argument: int = 0) -> Iterator[str]:
    """The layers, below the module that a function is given as its `argument`, with whose weight it computes."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # without a source there is nothing to find
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    known = _variables(tree, code.co_varnames[argument : argument + 1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value, known)
            if path and not _is_harmless(parents[node]):
                yield ".".join(path)


def _variables(tree: ast.AST, module: tuple[str, ...]) -> dict[str, list[str]]:
    """Where in the module the variables of a function lie: 'self' is the module, `layer = self.layer` a part of it."""
    known: dict[str, list[str]] = {name: [] for name in module}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            target, path = node.targets[0], _path(node.value, known)
        elif isinstance(node, ast.For):
            target, path = node.target, _path(node.iter, known)
            path = path and [*path, "*"]
        else:
            continue
        if isinstance(target, ast.Name) and path:
            known.setdefault(target.id, path)
    return known


def _path(node: ast.AST, known: dict[str, list[str]]) -> list[str] | None:
    """Where in the module an expression such as `self.layers[0].linear` lies: ['layers', '*', 'linear']."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, (ast.Attribute, ast.Subscript)):
        path = _path(node.value, known)
        return None if path is None else [*path, node.attr if isinstance(node, ast.Attribute) else "*"]
    return None


def _is_harmless(parent: ast.AST) -> bool:
    """Whether an expression does no more than look at what kind of weight there is."""
    if isinstance(parent, ast.Attribute):
        return parent.attr in _HARMLESS_ATTRIBUTES
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id in _HARMLESS_CALLS
    return isinstance(parent, ast.Compare) and isinstance(parent.ops[0], (ast.Is, ast.IsNot))


def computes_linearly(layer: nn.Module) -> bool:
    """Whether a subclass of `nn.Linear` or `Conv1D` with a forward of its own still computes x W^T + b.

    Found on a small copy in float64, whatever the layer's own size and device. Weights of special types (quantized,
    sharded) are taken for what PEFT takes them.
    """
    kind = next((kind for kind in (nn.Linear, Conv1D) if isinstance(layer, kind)), None)
    if kind is None or type(layer).forward is kind.forward or type(layer.weight) is not nn.Parameter:
        return True
    if not layer.weight.is_floating_point() or layer.weight.element_size() < 2:
        return True
    x, W, b = (torch.linspace(1, 9, n, dtype=torch.float64).sin() for n in (6, 12, 4))
    small: Any = copy.copy(layer)
    weight = W.view(4, 3) if kind is nn.Linear else W.view(3, 4)
    own = {"weight": weight, "bias": None if layer.bias is None else b}
    vars(small).update(_parameters=own, in_features=3, out_features=4, nx=3, nf=4, training=False)
    try:
        with torch.no_grad():
            found = type(layer).forward(small, x.view(2, 3))
            expected = kind.forward(small, x.view(2, 3))
    except Exception:  # whatever it needs, it is not the input of a linear layer
        return False
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
