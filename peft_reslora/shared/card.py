"""Model cards: what all have in common, and that of a native adapter, which says how to load and export it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from safetensors import safe_open

from peft_reslora.shared.files import CARD_FILE, WEIGHTS_FILE
from peft_reslora.shared.text import code, prose

if TYPE_CHECKING:
    from peft_reslora.shared.saving import SavedWhole

# Where the task type leaves no doubt; sequence to sequence may be translation, summarization and others.
_PIPELINE_TAGS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_START, _END = "<!-- peft_reslora: start -->", "<!-- peft_reslora: end -->"
_PACKAGES = ("peft_reslora", "peft", "transformers", "torch")


def write_native_card(folder: str | os.PathLike[str], config: SavedWhole) -> None:
    """Let the `README.md` of a native adapter say how to load and export it; made if there is none.

    The card that PEFT writes holds blanks to fill in and nothing else. As long as nobody has written into it, it is
    replaced; to another card the text is added, and renewed when the adapter is saved again.

    Args:
        folder: where the adapter is saved.
        config: of the adapter.
    """
    file = Path(folder) / CARD_FILE
    card = ModelCard.load(file) if file.exists() else ModelCard(card_head(config, []))
    text = f"{_START}\n{_native_text(config)}{_sizes(Path(folder) / WEIGHTS_FILE, config)}{_END}\n"
    before, start, rest = card.text.partition(_START)
    blank = ModelCard.from_template(ModelCardData()).text.split()
    if start:
        card.text = before + text + rest.partition(f"{_END}\n")[2]
    elif card.text.split()[: len(blank)] == blank:
        card.text = text + "".join(card.text.partition("### Framework versions")[1:])
    else:
        card.text = f"{card.text.rstrip()}\n\n{text}".lstrip()
    method = method_name(config).split(" ")[0].lower()
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), method]))
    card.save(file)


def _sizes(weights: Path, config: SavedWhole) -> str:
    """What the method made of each kind of layer, from the weights beside the config, which PEFT writes first."""
    sides = {}
    if weights.is_file():
        with safe_open(weights, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        sides = {key: shape[0] for key, shape in shapes.items() if shape}
    rows = config.size_table(sides) if sides else []
    return f"\n## Sizes\n\n{markdown_table(rows)}\n" if rows else ""


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows, of which the first is the header, as a table of Markdown whose first column holds names of layers."""
    header, *others = rows
    lines = [header, ("---",) * len(header), *((code(name), *map(prose, cells)) for name, *cells in others)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _type_name(config: PeftConfig) -> str:
    """The name of a PEFT method as it stands in the saved config."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def method_name(config: PeftConfig) -> str:
    """The name of a PEFT method as it is written in prose, with its variant and kind of blocks, if it has those."""
    known = {
        "ADALORA": "AdaLoRA",
        "LOHA": "LoHa",
        "LOKR": "LoKr",
        "LORA": "LoRA",
        "MORA": "MoRA",
        "RESLORA": "ResLoRA",
    }
    kinds = {"use_dora": "DoRA", "total_step": "AdaLoRA", "nested_ranks": "DyLoRA"}
    peft_type = _type_name(config)
    method = known.get(peft_type, peft_type)
    variants = [getattr(config, name, None) for name in ("shortcut", "mora_type")]
    variants += [kind for name, kind in kinds.items() if getattr(config, name, None) and kind != method]
    given = ", ".join(filter(None, variants))
    return f"{method} ({given})" if given else method


def is_local(base_model: str) -> bool:
    """Whether the name of a base model is a path on this machine and no Hub id."""
    return os.path.exists(base_model) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) is None


def _native_text(config: PeftConfig) -> str:
    """How to use an adapter as it was trained, with `peft_reslora`'s own `peft_type`."""
    return f"""# {prose(method_name(config))} adapter

This adapter is no standard LoRA; loading it takes the package `peft_reslora`, installed in a clone of its repository:

```sh
pip install .
```

```python
import peft_reslora  # registers the method with PEFT, which otherwise says KeyError: '{_type_name(config)}'
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo")
```

To use it without the package, write a standard LoRA checkpoint, or merge it into the base model:

```python
from peft_reslora import save_as_lora

save_as_lora("lora", model)
merged = model.merge_and_unload()
```

{versions()}
"""


def card_head(config: PeftConfig, tags: list[str]) -> str:
    """The YAML at the top of a card."""
    base_model, task_type = config.base_model_name_or_path, config.task_type
    data = ModelCardData(
        library_name="peft",
        base_model=base_model if base_model and not is_local(base_model) else None,
        tags=list(dict.fromkeys(tags)),
        pipeline_tag=_PIPELINE_TAGS.get(str(getattr(task_type, "value", task_type))),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n"


def versions() -> str:
    """A line with the versions of what made the file."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from a checkout
            continue
    return f"Versions: {', '.join(found)}."
