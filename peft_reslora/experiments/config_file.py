"""YAML files with strict keys: what is unknown is refused with the nearest known key and its line in the file."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from peft_reslora.shared.fields import shown

Key = tuple[str, ...]
"""Where a value stands: `("training", "learning_rate")`."""

Settings = TypeVar("Settings")

_UNCHECKED = "a value that its class accepts"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-3 is one, where YAML 1.1 sees a string; and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if (key := self.construct_object(key_node)) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


@dataclasses.dataclass(frozen=True)
class ConfigFile:
    """The values of a file with its overrides, and where each of them came from."""

    values: dict[str, Any]
    places: Mapping[Key, str]

    def place(self, key: Key) -> str:
        """`sst2.yaml, line 12`, or the override; of what the file has not, of the section above."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, "the settings")


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> ConfigFile:
    """Read a YAML file and put `section.key=value` overrides, whose values are YAML too, into it.

    Without an `output_dir` of its own, it gets the name of the file.

    Raises:
        ValueError: if the file is missing, no YAML or no mapping, or an override has no `=`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give the path of a YAML config.")
    text = path.read_text(encoding="utf-8")
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {shown(values)}, expected a mapping of keys to values.")
    places = dict(_places(node, path.name))
    values = {"output_dir": path.stem, **values}  # two files do not share a folder unless they say so
    return _overridden(ConfigFile(values, places), overrides)


def from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> ConfigFile:
    """The same for settings that a program holds."""
    return _overridden(ConfigFile(_copied(values), {}), overrides)


def _copied(value: Any) -> Any:
    return {str(k): _copied(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _places(node: yaml.Node, file: str, above: Key = ()) -> list[tuple[Key, str]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    found = []
    for key_node, value_node in node.value:
        key = (*above, str(key_node.value))
        found += [(key, f"{file}, line {key_node.start_mark.line + 1}"), *_places(value_node, file, key)]
    return found


def _overridden(config: ConfigFile, overrides: Sequence[str]) -> ConfigFile:
    values, places = _copied(config.values), dict(config.places)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ValueError(f"{shown(override)} is no override; write key=value, such as training.max_steps=10.")
        *sections, last = key = tuple(name.split("."))
        inner = values
        for depth, section in enumerate(sections, start=1):
            if not isinstance(held := inner.get(section), dict):
                # `base: minilm` stays what it is; a section that is unknown is refused when the settings are built
                is_base = key[:depth] == ("base",) and isinstance(held, str)
                inner[section] = {"name": held} if is_base else {}
                places[key[:depth]] = f"override {override}"
            inner = inner[section]
        inner[last] = yaml.load(text, Loader=_Loader)
        places[tuple(key)] = f"override {override}"
    return ConfigFile(values, places)


def refuse_unknown_keys(config: ConfigFile, key: Key, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that would be without effect.

    Raises:
        ValueError: naming the key, its place, the nearest known one, and all of them.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(sorted(known)) if len(known) <= 30 else f"{len(known)} others"
            raise ValueError(
                f"{config.place((*key, str(name)))}: unknown key {'.'.join((*key, str(name)))!r}.{hint} "
                f"Known here: {listed}."
            )


def build(kind: type[Settings], config: ConfigFile, key: Key = (), given: Any = None) -> Settings:
    """Make a dataclass of `given` (without it, of the whole file), and of nested ones what they hold.

    Raises:
        ValueError: for unknown keys, missing ones, and values of another type, with their place and what is accepted.
    """
    given = config.values if given is None and not key else given
    if not isinstance(given, Mapping):
        raise ValueError(f"{config.place(key)}: {'.'.join(key)} is {shown(given)}, expected a mapping.")
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    refuse_unknown_keys(config, key, given, list(known))
    for name, known_field in known.items():
        if name not in given and _is_required(known_field):
            raise ValueError(f"{config.place(key)}: {'.'.join((*key, name))} is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], config, (*key, name), value) for name, value in given.items()})


def _is_required(known: dataclasses.Field[Any]) -> bool:
    return known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING


def _value(hint: Any, config: ConfigFile, key: Key, value: Any) -> Any:
    origin, options = get_origin(hint), get_args(hint)
    if origin is dict and dataclasses.is_dataclass(options[1]) and isinstance(value, Mapping):
        kind = typing.cast("type[Any]", options[1])
        return {name: build(kind, config, (*key, name), entry) for name, entry in value.items()}
    if origin is list and dataclasses.is_dataclass(options[0]) and isinstance(value, list):
        kind = typing.cast("type[Any]", options[0])
        return [build(kind, config, (*key, str(index)), entry) for index, entry in enumerate(value)]
    nested = [option for option in (hint, *options) if dataclasses.is_dataclass(option)]
    if nested and isinstance(value, Mapping):
        return build(typing.cast("type[Any]", nested[0]), config, key, value)
    check_type(config, key, hint, value)
    return float(value) if hint is float else value


def check_type(config: ConfigFile, key: Key, hint: Any, value: Any) -> None:
    """Refuse a value that the annotation `hint` does not hold.

    Raises:
        ValueError: with its place, the value, and what is accepted.
    """
    if not fits(hint, value):
        raise ValueError(f"{config.place(key)}: {'.'.join(key)}={shown(value)} must be {described(hint)}.")


def fits(hint: Any, value: Any) -> bool:
    """Whether an annotation holds a value; one that is no type, or that YAML cannot write, holds everything."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(option, value) for option in options)
    if origin is Literal:
        return any(value is option or (value == option and type(value) is type(option)) for option in options)
    if hint is None or hint is type(None):
        return value is None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    check = _CHECKS.get(origin or hint)
    if check is None or not check(value):
        return check is None and not dataclasses.is_dataclass(hint)
    if origin in (list, set, Sequence) and options:
        return all(fits(options[0], entry) for entry in value)
    if origin in (dict, Mapping) and len(options) == 2:
        return all(fits(options[1], entry) for entry in value.values())
    return True


_CHECKS: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    list: lambda value: isinstance(value, list),
    set: lambda value: isinstance(value, list),
    Sequence: lambda value: isinstance(value, list),
    dict: lambda value: isinstance(value, dict),
    Mapping: lambda value: isinstance(value, dict),
}
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", type(None): "null"}


def described(hint: Any) -> str:
    """What an annotation holds, in words."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(described(option) for option in options))
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}"
    if hint is None:
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    if origin in (list, set, Sequence) or hint in (list, set):
        return f"a list ({described(options[0])} each)" if options else "a list"
    if origin in (dict, Mapping) or hint is dict:
        return "a mapping"
    return _WORDS.get(hint, _UNCHECKED)
