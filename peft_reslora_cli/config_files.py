"""The YAML files that come with the package, found by name wherever it is installed."""

from __future__ import annotations

import difflib
from pathlib import Path

_FOLDER = Path(__file__).parent / "configs"


def list_configs(kind: str) -> list[str]:
    """The names of all configs of a kind, `accelerate`, `train` or `compare`: `accelerate/ddp` and so on."""
    return [name for name in _all_configs() if name.startswith(f"{kind}/")]


def find_config(name_or_path: str | Path) -> Path:
    """The file at a path, or the one that comes with the package under a name.

    The name may leave out `.yaml`, and the first folders where one config only is called so: `ddp` for
    `accelerate/ddp`. A file of one's own goes first.

    Raises:
        ValueError: if there is no such file and no such config, or several; names those that come nearest.
    """
    if (path := Path(name_or_path)).is_file():
        return path
    configs = _all_configs()
    name = path.as_posix().removesuffix(".yaml")
    found = [known for known in configs if known == name] or [known for known in configs if known.endswith(f"/{name}")]
    if len(found) == 1:
        return configs[found[0]]
    if found:
        raise ValueError(f"several configs are called {name}; choose from {', '.join(found)}")
    raise ValueError(f"{name_or_path} is no file and no config of this package; {_advice(name, list(configs))}")


def _all_configs() -> dict[str, Path]:
    """Name and file of each config; the name is the path below the folder of all, without its suffix."""
    files = sorted(_FOLDER.rglob("*.yaml"))
    return {file.relative_to(_FOLDER).with_suffix("").as_posix(): file for file in files}


def _advice(name: str, known: list[str]) -> str:
    """The known names whose last part comes nearest; all where none is near."""
    last_parts = {config: config.rpartition("/")[2] for config in known}
    near = difflib.get_close_matches(name.rpartition("/")[2], set(last_parts.values()))
    meant = [config for part in near for config in known if last_parts[config] == part]
    return f"did you mean {' or '.join(meant)}?" if meant else f"known are {', '.join(known)}"
