"""What this package uses of PEFT and torch beyond their public names: here, and nowhere else.

Each entry says in which versions it was read, and what would end the need for it. Two places hold private names for
themselves: `registration.py` writes PEFT's tables, and `reslora/recompute.py` looks for torch's checkpoint among the
frames that run. The private hooks of PEFT that the tuners override stand at the end, in `OVERRIDDEN_HOOKS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CodeType, FrameType
from typing import Any

import torch
from peft import PeftModel

# PEFT 0.21.0 to 0.21.2. A public name for a dictionary of buffers would end the need.
from peft.tuners._buffer_dict import BufferDict

# PEFT 0.21.0 to 0.21.2, see `in_out_features` and `with_all_linear_layers`.
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from torch import nn
from torch.autograd import forward_ad

# torch 2.6 to 2.13; the convolutions have no other class in common.
from torch.nn.modules.conv import _ConvNd as Convolution

# torch 2.6 to 2.13: whether `register_module_forward_hook` and the like have put hooks on all modules.
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

# torch 2.6 to 2.13; torch's own documentation names the mode, and no public module holds it.
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

__all__ = ["BufferDict", "Convolution", "TorchDispatchMode", "has_any_global_hook", "tree_leaves"]

# PEFT's loaders, by the name of the function and of its module.
_LOAD_ADAPTER, _FROM_PRETRAINED = (("load_adapter", PeftModel.__module__), ("from_pretrained", PeftModel.__module__))
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # those that PEFT adapts


def in_out_features(layer: nn.Module) -> tuple[int | None, int | None]:
    """The sizes of a layer as PEFT sees them; (None, None) for a type that it does not know.

    A public `in_features` on all layers that PEFT adapts would end the need.
    """
    return _get_in_out_features(layer)


def with_all_linear_layers(config: Any, model: nn.Module) -> Any:
    """The config with the names of layers in place of "all-linear". PEFT 0.21.0 to 0.21.2."""
    return _maybe_include_all_linear_layers(config, model)


def has_adapter(module: Any, adapter_name: str) -> bool:
    """Whether a tuner's layer, or its copy of a module, has the adapter.

    PEFT 0.21.2; a public list of a layer's adapters would end the need.
    """
    return adapter_name in module._get_available_adapters()


def is_being_loaded(model: nn.Module, adapter_name: str) -> bool:
    """Whether PEFT's `load_adapter`, which runs now, has itself just put the adapter into the model.

    PEFT 0.21.0 to 0.21.2, which only then has a local `peft_config`; an undo of its own would end the need. It is
    known by where it stands, as ms-swift puts a function of its own before it.
    """
    frame = _running(_LOAD_ADAPTER)
    known: Any = {} if frame is None else frame.f_locals
    return known.get("self") is model and known.get("adapter_name") == adapter_name and "peft_config" in known


def loader_runs() -> bool:
    """Whether `PeftModel.from_pretrained` or `load_adapter` runs, which load the tensors of an adapter next to the
    config that they read, in this very call. PEFT 0.21.0 to 0.21.2; an argument that says so would end the need."""
    return _running(_LOAD_ADAPTER, _FROM_PRETRAINED) is not None


def _running(*functions: tuple[str, str]) -> FrameType | None:
    """The frame of one of these functions, among those that run in this thread."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_name, frame.f_globals.get("__name__")) not in functions:
        frame = frame.f_back
    return frame


def set_adapters_off(layer: BaseTunerLayer, off: bool) -> None:
    """Turn a layer's adapters off or on, and nothing else; PEFT's own method also changes what is trained.

    PEFT 0.21.2; an `enable_adapters` that leaves `requires_grad` alone would end the need.
    """
    layer._disable_adapters = off


def cast_input(layer: BaseTunerLayer, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in the adapter's dtype, unless the user has forbidden it. PEFT 0.21.2."""
    return layer._cast_input_dtype(x, dtype)


def auto_classes(auto_class: Any) -> Any:
    """From the classes of configs to those of models, of one of transformers' auto classes. transformers 5.23."""
    return auto_class._model_mapping


def custom_modules(config: Any) -> tuple[type[nn.Module], ...]:
    """The base layers for which a config brings tuner layers of its own. PEFT 0.21.2, which has no public reader."""
    return tuple(config._custom_modules or ())


def is_tensor_parallel(base_layer: nn.Module) -> bool:
    """Whether PEFT has noted that transformers shards the layer by tensor parallelism. PEFT 0.21.2."""
    return getattr(base_layer, "_hf_tp_plan", None) is not None


def is_transposed_parameter(layer: Any) -> bool:
    """Whether what a layer over a parameter adapts is `(in, out)` for each expert, as gpt-oss has it, by the flag
    `is_transposed` on the module that holds it. PEFT 0.21.2, which keeps the answer in a private field.
    """
    return layer._param_ndim == 3 and not layer._did_swap_in_out_features


def parameter_shape(module: nn.Module, parameter: torch.Tensor) -> tuple[int, int, int]:
    """The experts, in_features and out_features of a parameter with two or three dimensions, as a layer of PEFT's
    that is yet to be made over it will have them (`ParamWrapper`). PEFT 0.21.2.
    """
    shape = getattr(parameter, "ds_shape", parameter.shape)  # of a partition of DeepSpeed's
    experts = shape[0] if len(shape) == 3 else 1
    last, first = shape[-1], shape[-2]
    is_transposed = len(shape) == 3 and getattr(module, "is_transposed", False)
    return (experts, first, last) if is_transposed else (experts, last, first)


def own_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that a module holds itself, and does not compute or get from a hook. torch 2.6 to 2.13.

    `named_parameters` leaves out a second name for one parameter, and `getattr` finds what is computed.
    """
    return module._parameters.get(name)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module holds itself."""
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def own_tensor_names(module: nn.Module) -> list[str]:
    """The names of the parameters and buffers that a module holds itself, those that are None included."""
    return [*module._parameters, *module._buffers]


@contextmanager
def parameters_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let modules hold at the end the very parameters, in their order, that they held at the beginning.

    PEFT's layer over `nn.MultiheadAttention` puts new ones in their place whenever its modules are listed (0.21.2).
    """
    before = [dict(module._parameters) for module in modules]
    try:
        yield
    finally:
        for module, parameters in zip(modules, before, strict=True):
            module._parameters.clear()
            module._parameters.update(parameters)


def stand_in(module: Any, **attributes: Any) -> Any:
    """An object of the module's class that shares everything with it but these attributes; not what `compile()` made
    of a call of the module itself. torch 2.6 to 2.13.
    """
    other = object.__new__(type(module))
    vars(other).update(vars(module), _compiled_call_impl=None, **attributes)
    return other


def children_by_name(module: nn.Module) -> dict[str, nn.Module | None]:
    """All children; `named_children` leaves out a second name for one module. torch 2.6 to 2.13."""
    return module._modules


def apply_to_tensors(module: nn.Module, function: Callable[..., Any]) -> None:
    """What `module.to` and the like do with a module's tensors. torch 2.6 to 2.13."""
    module._apply(function)


def pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward pre-hooks on a module; torch shows them in no other way. torch 2.6 to 2.13."""
    return list(module._forward_pre_hooks.values())


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of the module run compiled code: by `module.compile()`, or by a wrapper. torch 2.6 to 2.13."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The forward hooks on a module. torch 2.6 to 2.13."""
    return list(module._forward_hooks.values())


def remove_hooks(module: nn.Module, chosen: Callable[[Callable[..., Any]], bool]) -> None:
    """Take forward hooks off a module. torch's own handles do not survive a copy of the model. torch 2.6 to 2.13."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if chosen(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def is_bare_linear(module: nn.Module) -> bool:
    """Whether a call of `module` does nothing but multiply by its weight: no hooks, no forward put in its place.

    ZeRO-3, offloading and FSDP1 load what is to be multiplied in such hooks. torch 2.6 to 2.13.
    """
    return type(module) is nn.Linear and is_bare(module)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of a linear layer or a convolution does what its class says, to the weight that it holds, and
    nobody sees it: no hooks, on it or on all modules. torch 2.6 to 2.13.
    """
    seen = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    replaced = "forward" in module.__dict__ or type(module) not in (nn.Linear, *CONVOLUTIONS)
    return not (replaced or seen or has_any_global_hook())


def plain_weights(layer: nn.Module, containers: Sequence[str], name: str) -> list[torch.Tensor] | None:
    """The weights of the linear layers `name` in some of a layer's containers; None if calls of them do more than
    multiply by these (`is_bare_linear`), or they are not plain numbers, as where an engine shards or loads them.

    Asked for each layer and token, so that it is read past `nn.Module.__getattr__`, which would take most of the time.
    torch 2.6 to 2.13.
    """
    children, weights = layer._modules, list[torch.Tensor]()
    for container in containers:
        linear: Any = children[container]._modules[name]  # type: ignore[union-attr]
        if type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return None
        weight = linear._parameters.get("weight")
        if type(weight) is not nn.Parameter or "forward" in linear.__dict__ or weight.dim() != 2 or not weight.numel():
            return None
        weights.append(weight)
    return weights


def convolve(convolution: Convolution, x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """What the convolution would compute with another kernel and without bias; padded as its padding mode says.

    torch 2.6 to 2.13; a function for all padding modes would end the need.
    """
    return convolution._conv_forward(x, kernel, None)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active, which see no custom Function.

    torch 2.6 to 2.13; `torch.func` tells nobody.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_observed() -> bool:
    """Whether something sees, or changes, what is computed without gradients: a compiler, a trace, a transform,
    autocast, hooks on all modules or on saved tensors, or a running backward pass.

    torch 2.6 to 2.13, the last two 2.13, see `pack_hook`; public names answer for less, and take longer.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._current_graph_task_id() != -1
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        or has_any_global_hook()
    )


def unseen_by_modes() -> AbstractContextManager[Any]:
    """Around operations that a recomputation does not repeat: selective checkpointing counts those that it sees, and
    would take one for another. torch 2.6 to 2.13.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return nullcontext()
    return _disable_current_modes()


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor has been changed in place; 0 where nobody counts. torch 2.6 to 2.13."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells the memory of tensors apart, also where it is empty or on the meta device. torch 2.6 to 2.13."""
    return storage._cdata


def fingerprint_of(dataset: Any) -> str:
    """By which `datasets` (4 and 5) knows the content of a data set."""
    return dataset._fingerprint


def backward_task() -> int:
    """The backward pass that runs in this thread; -1 if none does.

    torch 2.13, whose own `torch.utils.checkpoint` uses it.
    """
    return torch._C._current_graph_task_id()


def pack_hook() -> Callable[..., Any] | None:
    """The innermost hook by which tensors are saved for the backward pass, if there is any. torch 2.13."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


def is_from_function(node: Any, function: type[torch.autograd.Function]) -> bool:
    """Whether a node of the autograd graph is the backward of a Function. torch 2.6 to 2.13."""
    return isinstance(node, function._backward_cls)


# Where the frames of a backward pass begin. torch 2.6 to 2.13.
BACKWARD_ENGINE: CodeType = torch.autograd.graph._engine_run_backward.__code__

# Private methods of PEFT's tuners and layers, torch's modules included, that this package overrides or calls by
# `super()`; read in 0.21.0 to 0.21.2.
OVERRIDDEN_HOOKS = frozenset(
    {
        "_add_modules_to_save_to_tie",
        "_apply",
        "_cast_input_dtype",
        "_check_forward_args",
        "_create_and_replace",
        "_enable_peft_forward_hooks",
        "_get_adapter_state_dict",
        "_get_tied_target_modules",
        "_mixed_batch_forward",
        "_move_adapter_to_device_of_base_layer",
        "_remap_adapter_state_dict_for_load",
        "_remove_adapter_name_from_key",
        "_replace_module",
        "_restore_weights",
        "_unload_and_optionally_merge",
    }
)
