"""Chains: which target layers hand something to which, found from their names and shapes.

A chain is the ordered list of target layers of one role: the same path once block indices are wildcarded, the same
in_features and out_features, and of convolutions the same size of the kernel. Blocks without such a layer are passed
over, as the chains of a hybrid's attention pass over its Mamba blocks. Names and shapes do not tell everything: what
only the model tells stands in *cuts*, the layers at which a new chain begins (`cuts.py` finds them,
`ResLoRAConfig.chain_cuts` keeps them). The rule and the cuts make the chains of an adapter, in a model and from its
files; the rule stays as it is, so that saved adapters stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from peft_reslora.reslora.config import AUTO, ResLoRAConfig
from peft_reslora.shared.fields import shown
from peft_reslora.shared.tables import format_table

_KEPT = "chain_cuts of the adapter's config ends a chain here"

EMBEDDING = "embedding"  # a `Target.kind`


@dataclass(frozen=True)
class Target:
    """One target layer: its path in the base model, its shape and the rank of its block.

    `kind` is empty for linear layers; of a convolution it is the size of the kernel, and the features are channels.
    The in_features of an embedding are its entries.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    kind: str = ""

    @property
    def shape(self) -> str:
        return f"{self.in_features}->{self.out_features}{self.kind and f' ({self.kind})'}"


def kernel_kind(size: Iterable[int]) -> str:
    """The `kind` of a convolution's target: 3x3."""
    return "x".join(map(str, size))


@dataclass(frozen=True)
class MissingLink:
    """Two neighbors in one role that are not linked, and why."""

    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Role:
    """The target layers that share a role, cut into chains; `missing` explains each cut."""

    name: str
    chains: tuple[tuple[Target, ...], ...]
    missing: tuple[MissingLink, ...]


@dataclass(frozen=True, repr=False)
class ChainTable:
    """All chains of one adapter, and what a forward pass showed of them; `str` and `repr` lay it out as a table."""

    shortcut: str
    pre_num: int
    roles: tuple[Role, ...]
    findings: tuple[str, ...] = ()

    @property
    def chains(self) -> list[tuple[Target, ...]]:
        return [chain for role in self.roles for chain in role.chains]

    @property
    def num_links(self) -> int:
        """How many pairs of a layer and an earlier one that feeds it there are."""
        return sum(reach(n, self.pre_num) for chain in self.chains for n in range(len(chain)))

    @property
    def missing(self) -> list[MissingLink]:
        return [link for role in self.roles for link in role.missing]

    def __str__(self) -> str:
        rows = [("role", "layers", "shape", "r", "links", "first", "last")]
        for role in self.roles:
            for chain in role.chains:
                links = sum(reach(n, self.pre_num) for n in range(len(chain)))
                ranks = sorted({target.rank for target in chain})
                rows.append(
                    (
                        role.name,
                        str(len(chain)),
                        chain[0].shape,
                        "-".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
                        str(links),
                        _indices_text(role.name, chain[0]),
                        _indices_text(role.name, chain[-1]),
                    )
                )
        layers = sum(len(chain) for chain in self.chains)
        title = f"shortcut={self.shortcut!r}, pre_num={self.pre_num}: {layers} layers in {len(self.chains)} chains, "
        lines = [title + f"{self.num_links} links", *format_table(rows)]
        if self.missing:
            lines += ["links not made:", *(f"  {m.before} -> {m.after}: {m.reason}" for m in self.missing)]
        if self.findings:
            lines += ["seen in a forward pass:", *(f"  {finding}" for finding in self.findings)]
        return "\n".join(lines)

    __repr__ = __str__


def _indices_text(role: str, target: Target) -> str:
    parts = zip(role.split("."), target.name.split("."), strict=False)
    return ".".join(value for pattern, value in parts if pattern != value) or "-"


def reach(position: int, pre_num: int) -> int:
    """How many earlier layers feed the layer at `position` of its chain."""
    return position if pre_num == -1 else min(position, pre_num)


def find_chains(
    targets: Iterable[Target],
    shortcut: str,
    pre_num: int,
    chain_pattern: Sequence[str] | str | None = None,
    cuts: Mapping[str, str] | None = None,
) -> ChainTable:
    """Group `targets` into chains.

    Layers of one role are ordered by their block indices, and each is linked to the one before it that has its shape.

    Args:
        targets: the target layers.
        shortcut: for the table.
        pre_num: for the table.
        chain_pattern: finds role and order of layers whose names say them in another way.
        cuts: the names of layers at which a new chain begins, and why.

    Raises:
        ValueError: if a `chain_pattern` captures no number, or cannot tell two layers apart.
    """
    roles = (_cut_into_chains(role, members, cuts or {}) for role, _, members in _roles(targets, chain_pattern))
    return ChainTable(shortcut, pre_num, tuple(roles))


def chain_settings(config: ResLoRAConfig) -> tuple[str, int, list[str] | str | None]:
    """What `find_chains` takes of a config."""
    return config.shortcut, config.pre_num, config.chain_pattern


def kept_cuts(chain_cuts: Sequence[str], targets: Iterable[Target]) -> dict[str, str]:
    """The layers at or below the modules that a config's `chain_cuts` names.

    Raises:
        ValueError: if one of them has no layer of the adapter.
    """
    wanted, used = set(chain_cuts), set()
    found = {}
    for target in targets:
        if named := wanted.intersection(_path(target.name)):
            used |= named
            found[target.name] = _KEPT
    if unused := sorted(wanted - used):
        raise ValueError(
            f"chain_cuts of the adapter's config names {', '.join(map(shown, unused[:3]))}, where the adapter has no "
            "layers, so its chains would be others than those it was made with. It belongs to another model; or set "
            f"chain_cuts={AUTO!r} to have a new adapter's chains found on this one."
        )
    return found


def cuts_by_number(targets: Iterable[Target], chain_pattern: Sequence[str] | str | None) -> dict[str, str]:
    """The cuts of version 0.1.0: wherever block numbers are not consecutive, and wherever the shape changes."""
    cuts = {}
    for _, by_pattern, members in _roles(targets, chain_pattern):
        for (before_indices, before), (after_indices, after) in pairwise(members):
            first, second = _first_difference(before_indices, after_indices)
            if second - first != 1 and not by_pattern:
                cuts[after.name] = f"blocks {first} and {second} are not consecutive"
            elif before.shape != after.shape:
                cuts[after.name] = _other_shape(before, after)
    return cuts


def shortest_cuts(cuts: Iterable[str], table: ChainTable) -> list[str]:
    """As few modules as possible, at and below which exactly `cuts`, and other beginnings of chains, are."""
    begins = {chain[0].name for chain in table.chains}
    within: set[str] = set()  # modules below which a layer is that continues a chain
    for chain in table.chains:
        for target in chain:
            if target.name not in begins:
                within |= set(_path(target.name))
    shortest = {next(module for module in _path(name) if module not in within) for name in cuts}
    return sorted(shortest)


def _path(name: str) -> list[str]:
    """The modules above a layer, from the outermost on, and the layer itself."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


_Members = list[tuple[tuple[int, ...], Target]]


def _roles(
    targets: Iterable[Target], chain_pattern: Sequence[str] | str | None
) -> Iterator[tuple[str, bool, _Members]]:
    """Each role, whether a pattern made it, and its layers with their block indices, in order.

    Raises:
        ValueError: if two layers of one role have the same indices.
    """
    patterns = [chain_pattern] if isinstance(chain_pattern, str) else list(chain_pattern or ())
    roles: dict[tuple[str, bool], _Members] = {}
    for target in targets:
        role, indices, by_pattern = _role_of(target.name, patterns)
        roles.setdefault((role, by_pattern), []).append((indices, target))
    for (role, by_pattern), members in roles.items():
        members.sort(key=lambda member: member[0])
        for (before_indices, before), (after_indices, after) in pairwise(members):
            if before_indices == after_indices:
                raise ValueError(
                    f"chain_pattern cannot tell the layers {before.name!r} and {after.name!r} apart: both are number "
                    f"{before_indices} of role {role!r}. Capture more of the name."
                )
        yield role, by_pattern, members


def _role_of(name: str, patterns: Sequence[str]) -> tuple[str, tuple[int, ...], bool]:
    """Split a module name into its role, its block indices, and whether a pattern told them."""
    for pattern in patterns:
        if match := re.search(pattern, name):
            return _role_by_pattern(name, match)
    parts = name.split(".")
    # Experts work side by side, not one after the other: expert 3 is part of the role, not a block index.
    numbers = [i for i, p in enumerate(parts) if p.isdigit() and not (i and "expert" in parts[i - 1].lower())]
    # The last part is the layer's own name within its block (`blocks.3.mlp.0`), unless there is no other number.
    numbers = [i for i in numbers if i < len(parts) - 1] or numbers
    indices = tuple(int(parts[i]) for i in numbers)
    return ".".join("*" if i in numbers else part for i, part in enumerate(parts)), indices, False


def _role_by_pattern(name: str, match: re.Match[str]) -> tuple[str, tuple[int, ...], bool]:
    groups = [i for i, value in enumerate(match.groups(), 1) if value is not None]
    if not groups or not all(match[i].isdigit() for i in groups):
        raise ValueError(
            f"chain_pattern {match.re.pattern!r} matches layer {name!r} but its groups capture "
            f"{[match[i] for i in groups]}; they have to capture the block's number, as in r'lin(\\d+)$'."
        )
    role = name
    for i in reversed(groups):
        role = role[: match.start(i)] + "*" + role[match.end(i) :]
    return role, tuple(int(match[i]) for i in groups), True


def _cut_into_chains(role: str, members: _Members, cuts: Mapping[str, str]) -> Role:
    chains: list[list[Target]] = []
    latest: dict[str, list[Target]] = {}  # by shape
    missing = []
    for n, (_, target) in enumerate(members):
        chain = latest.get(target.shape)
        if chain is not None and target.name not in cuts:
            chain.append(target)
            continue
        if chain is not None:
            missing.append(MissingLink(chain[-1].name, target.name, cuts[target.name]))
        elif n > 0:
            before = members[n - 1][1]
            missing.append(MissingLink(before.name, target.name, _other_shape(before, target)))
        latest[target.shape] = [target]
        chains.append(latest[target.shape])
    return Role(role, tuple(map(tuple, chains)), tuple(missing))


def _other_shape(before: Target, after: Target) -> str:
    return f"shapes differ, {before.shape} and {after.shape}"


def _first_difference(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, int]:
    return next((a, b) for a, b in zip(before, after, strict=True) if a != b)
