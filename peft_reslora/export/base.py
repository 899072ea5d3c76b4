"""The base model of an adapter without its weights: which class it is of, and what its layers are called.

Nothing here uses the network: a config is read from a local folder or from the cache of the Hub.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator
from typing import Any

import torch
import transformers
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig

from peft_reslora.shared.host import auto_classes

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_MOST_LAYERS = 10_000  # a config with more, from somebody else, is not built


def config_of_base(config: PeftConfig, base: str | None = None) -> PretrainedConfig | None:
    """The config of the adapter's base model, or of `base`; None where it is not on this machine."""
    name, revision = (base, None) if base else (config.base_model_name_or_path, config.revision)
    if not isinstance(name, str) or not name:
        return None
    try:
        return transformers.AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except Exception:  # whatever a file of somebody else makes transformers raise
        return None


def base_classes(config: PeftConfig, base_config: PretrainedConfig) -> list[type[nn.Module]]:
    """The classes of transformers on which the adapter may have been trained, the likeliest first.

    That of the adapter's task, if transformers has one for this base; that which PEFT wrote down; and that in which
    the base itself was saved, as of a vision-language model whose adapter says 'CAUSAL_LM'.
    """
    task, names = getattr(config.task_type, "value", config.task_type), []
    found: list[Any] = [_of_auto_class(_AUTO_CLASSES.get(str(task), "AutoModel"), base_config)] if task else []
    names += [(config.auto_mapping or {}).get("base_model_class"), *(base_config.architectures or [])]
    found += [getattr(transformers, name, None) for name in names if isinstance(name, str)]
    found.append(_of_auto_class("AutoModel", base_config))
    return list(dict.fromkeys(c for c in found if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)))


def fitting_bases(
    config: PeftConfig, base_config: PretrainedConfig, layers: Collection[str]
) -> Iterator[tuple[type[nn.Module], nn.Module]]:
    """The classes of `base_classes` whose models have all of these layers, each with a model without weights."""
    for base_class in base_classes(config, base_config):
        own = [part for part in _parts(base_config) if isinstance(part, base_class.config_class)]  # type: ignore[attr-defined]
        model = without_weights(base_class, own[0] if own else base_config)
        if model is not None and set(layers) <= {name for name, _ in model.named_modules()}:
            yield base_class, model


def without_weights(base_class: Any, config: Any) -> nn.Module | None:
    """A model on the meta device, as its class builds it from its config; None where that does not work."""
    if is_oversized(config) or _fetches_weights(config):
        return None
    build = getattr(base_class, "_from_config", None) or getattr(base_class, "from_config", base_class)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return build(copy.deepcopy(config))
    except Exception:  # a class that takes more than its config, or a config that does not fit it
        return None


def unknown_layers(base_model: nn.Module, layers: Collection[str]) -> list[str]:
    """Those of the layers that a model of this class lacks when it is built anew from its config.

    None of them where it cannot be built so: only models of transformers and diffusers can.
    """
    config = getattr(base_model, "config", None)
    if config is None or not hasattr(type(base_model), "from_pretrained"):
        return []
    twin = without_weights(type(base_model), config)
    names = None if twin is None else {name for name, _ in twin.named_modules()}
    return [] if names is None else [name for name in layers if name not in names]


def _of_auto_class(name: str, base_config: PretrainedConfig) -> Any:
    try:
        found = auto_classes(getattr(transformers, name)).get(type(base_config), None)
    except (ImportError, AttributeError, ValueError):  # a class whose own requirements are not installed
        return None
    return found[0] if isinstance(found, (list, tuple)) else found


def is_oversized(config: Any) -> bool:
    """Whether a config asks for more layers than models have."""
    counts = [getattr(part, "num_hidden_layers", 0) for part in _parts(config)]
    return any(isinstance(count, (int, float)) and count > _MOST_LAYERS for count in counts)


def _fetches_weights(config: Any) -> bool:
    """Whether building the model would load the weights of a part of it."""
    return any(getattr(part, "use_pretrained_backbone", False) for part in _parts(config))


def _parts(config: Any) -> list[PretrainedConfig]:
    """A config of transformers and those in it, such as a vision model's."""
    parts = [config, *(vars(config).values() if isinstance(config, PretrainedConfig) else ())]
    return [part for part in parts if isinstance(part, PretrainedConfig)]
