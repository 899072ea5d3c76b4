"""Factors that are about to be loaded are not drawn at random first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

# What PEFT (0.21.2), torch's layers and MoRA draw the factors of a new adapter with.
_DRAWS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)


class Undrawn(TorchFunctionMode):
    """Inside, these functions fill a tensor with zeros, and leave the generator of random numbers as it is.

    Zeros, and not whatever is in the memory: if nothing is loaded after all, the update is zero.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _DRAWS:
            tensor = kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
            return nn.init.zeros_(tensor)
        return func(*args, **(kwargs or {}))
