"""An injection that fails leaves the model as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from peft_reslora.shared.host import has_adapter

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def undone_on_failure(tuner: BaseTuner, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Put back modules, parameters, flags and configs if what happens inside raises.

    PEFT (0.21.2) finds some faults of a config only when layers have been replaced.
    """
    config = tuner.peft_config[adapter_name]
    objects: list[Any] = [*model.modules(), tuner, config]
    if hasattr(getattr(model, "config", None), "__dict__"):
        objects.append(model.config)  # layer replication writes the number of layers into it
    before = [_Before(thing) for thing in objects]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for state in before:
            state.restore()
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad
        if not _holds(model, adapter_name):
            tuner.peft_config.pop(adapter_name, None)
        if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
            vars(model)["_hf_peft_config_loaded"] = False  # transformers (5.23) sets it before it injects
        raise


@contextmanager
def configs_kept(model: nn.Module) -> Iterator[None]:
    """Put back the configs of the adapters that `model` holds if what happens inside raises.

    A tuner that is made for a model with adapters enters its config first, also over that of an adapter of the same
    name (PEFT 0.21.2).
    """
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    before = dict(configs)
    try:
        yield
    except BaseException:
        configs.clear()
        configs.update(before)
        raise


class _Before:
    """The attributes of an object, and what its dictionaries, lists and sets held."""

    def __init__(self, thing: Any) -> None:
        self.thing, self.kind, self.attributes = thing, type(thing), dict(vars(thing))
        self.held = [(held, held.copy()) for held in self.attributes.values() if type(held) in _CONTAINERS]

    def restore(self) -> None:
        if type(self.thing) is not self.kind:
            self.thing.__class__ = self.kind
        vars(self.thing).clear()
        vars(self.thing).update(self.attributes)
        for held, content in self.held:
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(content)


def _holds(model: nn.Module, adapter_name: str) -> bool:
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return any(has_adapter(layer, adapter_name) for layer in layers)
