"""The only writer of PEFT's tables: makes the tuners known to PEFT."""

from __future__ import annotations

from typing import Any

import peft
import transformers
from packaging.version import Version
from peft.utils.peft_types import PeftType

# The test suite passes on these; earlier ones lack the tuner's hooks for state dicts (`_get_adapter_state_dict`,
# `_remap_adapter_state_dict_for_load`), which this plugin needs to refuse a checkpoint that does not fit.
SUPPORTED_PEFT = (Version("0.21.0"), Version("0.22.0"))
# 5.24 refuses PEFT below 0.22 in `add_adapter`, `load_adapter` and the like (MIN_PEFT_VERSION in
# transformers/integrations/peft.py, 0.20.0 in 5.23): both bounds rise together.
SUPPORTED_TRANSFORMERS = (Version("5.0.0"), Version("5.24.0"))


def check_peft_version(version: str = peft.__version__) -> None:
    """Refuse a PEFT on which the test suite does not pass.

    Raises:
        ImportError: if `version` is outside `SUPPORTED_PEFT`.
    """
    _check_version("peft", version, *SUPPORTED_PEFT)


def check_transformers_version(version: str = transformers.__version__) -> None:
    """Refuse a transformers on which the test suite does not pass.

    Raises:
        ImportError: if `version` is outside `SUPPORTED_TRANSFORMERS`.
    """
    _check_version("transformers", version, *SUPPORTED_TRANSFORMERS)


def _check_version(package: str, version: str, first: Version, beyond: Version) -> None:
    """A development version or a release candidate counts as the version that it leads to."""
    installed = Version(Version(version).base_version)
    if first <= installed < beyond:
        return
    newer = "Look for a newer peft_reslora that knows it, or install" if installed >= beyond else "Install"
    raise ImportError(
        f"peft_reslora works with {package}>={first},<{beyond}, but {package} {version} is installed. "
        f"{newer} a supported one: pip install '{package}>={first},<{beyond}'."
    )


def add_peft_type(name: str) -> PeftType:
    """Add a member to `PeftType`, as if it had been written there.

    PEFT (read in 0.21.2) looks the type up as an attribute, by value and by iteration, and both PEFT and transformers
    call `peft_type.value`, so a plain string does not do.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumMeta forbids setting attributes that are members; `type` does not know about members.
    type.__setattr__(PeftType, name, member)
    return member


def register_tuner(name: str, config_cls: type, model_cls: type) -> None:
    """Enter one tuner into PEFT's tables; a second call with the same classes changes nothing.

    `peft.utils.register_peft_method` (0.21.2) is not used: it looks for the prefix among the tables' keys, so it would
    not notice a clash, and it refuses to be called twice.

    Raises:
        ValueError: if another package holds the name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    tables: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, model_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, model_cls.prefix),  # type: ignore[attr-defined]
    ]
    for table, entry in tables:
        held = table.get(name, entry)
        if _origin(held) != _origin(entry):
            raise ValueError(
                f"PEFT already has a method called {name!r}, held by {_origin(held)}; peft_reslora cannot register "
                f"{_origin(entry)}. Import only one of the two packages."
            )
    peft_type = add_peft_type(name)
    for table, entry in tables:
        table[peft_type] = entry


def _origin(entry: object) -> str:
    """Name a table's entry so that a reloaded module counts as the same."""
    return f"{entry.__module__}.{entry.__qualname__}" if isinstance(entry, type) else repr(entry)


def register() -> None:
    """Register the tuners of this package. Idempotent."""
    check_peft_version()
    check_transformers_version()
    # The configs set `PeftType.RESLORA` and `PeftType.MORA`, so the members have to be there before they are imported.
    add_peft_type("RESLORA")
    add_peft_type("MORA")
    from peft_reslora.mora import MoRAConfig, MoRAModel
    from peft_reslora.reslora import ResLoRAConfig, ResLoRAModel

    register_tuner("RESLORA", ResLoRAConfig, ResLoRAModel)
    register_tuner("MORA", MoRAConfig, MoRAModel)
