"""What `export` and `inspect` both read of a saved adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable


def layer_names(keys: Iterable[str]) -> set[str]:
    """The layers of a saved adapter, by whichever method, from the keys of its tensors."""
    from peft_reslora.shared.names import bare_name

    found = (re.match(r"(?:base_model\.model\.)?(.+?)\.(?:lora|mora|hada|lokr)_", key) for key in keys)
    return {bare_name(match[1]) for match in found if match}
