"""Model cards: what an exported LoRA is and what made it, and how to use a native adapter."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from safetensors import safe_open

from peft_reslora.export.report import COLUMNS, ExportReport
from peft_reslora.mora import MoRAConfig
from peft_reslora.mora.model import size_table
from peft_reslora.shared.saving import WEIGHTS_FILE
from peft_reslora.shared.text import code, code_block, prose

if TYPE_CHECKING:
    from peft_reslora.export.checkpoint import LoraExport

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


def lora_card(config: PeftConfig, report: ExportReport, command: str | None = None) -> str:
    """The `README.md` of an exported LoRA.

    Args:
        config: the config in the same folder.
        report: what the export did.
        command: the shell command that made it, if it was one.
    """
    method = report.method.split(" ")[0]
    return f"""{_head(config, ["lora", method.lower()])}
# LoRA from {prose(report.method)}

A standard LoRA (r = alpha = {report.r}): it loads with PEFT, and with what reads PEFT's checkpoints, without
`peft_reslora`. The adapter was trained with {prose(method)}.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo")
```

## What the conversion kept

{_kept(report)}

## How it was made

{code_block("sh", command) if command else code_block("python", report.call)}

{_versions()}
"""


def pipeline_card(components: Mapping[str, LoraExport]) -> str:
    """The `README.md` beside one file with the exports of several models of a diffusers pipeline."""
    methods = sorted({export.report.method.split(" ")[0] for export in components.values()})
    parts = "\n\n".join(f"### {code(name)}\n\n{_kept(export.report)}" for name, export in components.items())
    config = next(iter(components.values())).config
    return f"""{_head(config, ["lora", *map(str.lower, methods)])}
# LoRA from {prose(", ".join(methods))} for a diffusers pipeline

A standard LoRA for the models {", ".join(map(code, components))}: it loads without `peft_reslora`.

```python
pipeline.load_lora_weights("path/or/repo")
```

## What the conversion kept

{parts}

{_versions()}
"""


def write_native_card(folder: str | os.PathLike[str], config: PeftConfig) -> None:
    """Let the `README.md` of a native adapter say how to load and export it; made if there is none.

    The card that PEFT writes holds blanks to fill in and nothing else. As long as nobody has written into it, it is
    replaced; to another card the text is added, and renewed when the adapter is saved again.

    Args:
        folder: where the adapter is saved.
        config: of the adapter.
    """
    file = Path(folder) / "README.md"
    card = ModelCard.load(file) if file.exists() else ModelCard(_head(config, []))
    text = f"{_START}\n{_native_text(config)}{_mora_sizes(Path(folder), config)}{_END}\n"
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


def _kept(report: ExportReport) -> str:
    """What the conversion kept, in words and as a table."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [(code(name), *map(prose, others)) for name, *others in (layer.cells() for layer in report.layers)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{prose(report.summary())}\n\n{table}"


def _mora_sizes(folder: Path, config: PeftConfig) -> str:
    """What MoRA made of each kind of layer, from the weights beside the config, which PEFT writes first."""
    weights = folder / WEIGHTS_FILE
    if not isinstance(config, MoRAConfig) or not weights.is_file():
        return ""
    with safe_open(weights, framework="pt") as tensors:
        sides = {key: tensors.get_slice(key).get_shape()[0] for key in tensors.keys()}  # noqa: SIM118 - no iterator
    header, *rows = size_table(config, sides)
    lines = [header, ("---",) * len(header), *((code(role), *map(prose, others)) for role, *others in rows)]
    return "\n## Sizes\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def method_name(config: PeftConfig) -> str:
    """The name of a PEFT method as it is written in prose, with the variant where there are several."""
    known = {
        "ADALORA": "AdaLoRA",
        "LOHA": "LoHa",
        "LOKR": "LoKr",
        "LORA": "LoRA",
        "MORA": "MoRA",
        "RESLORA": "ResLoRA",
    }
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    variant = getattr(config, "shortcut", None) or getattr(config, "mora_type", None)
    return known.get(peft_type, peft_type) + (f" ({variant})" if variant else "")


def is_local(base_model: str) -> bool:
    """Whether the name of a base model is a path on this machine and no Hub id."""
    return os.path.exists(base_model) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) is None


def _native_text(config: PeftConfig) -> str:
    """How to use an adapter as it was trained, with `peft_reslora`'s own `peft_type`."""
    return f"""# {prose(method_name(config))} adapter

This adapter is no standard LoRA; loading it takes the package `peft_reslora`:

```sh
pip install peft_reslora
```

```python
import peft_reslora  # registers the method with PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/or/repo")
```

To use it without the package, write a standard LoRA checkpoint, or merge it into the base model:

```python
from peft_reslora import save_as_lora

save_as_lora("lora", model)
merged = model.merge_and_unload()
```

{_versions()}
"""


def _head(config: PeftConfig, tags: list[str]) -> str:
    base_model, task_type = config.base_model_name_or_path, config.task_type
    data = ModelCardData(
        library_name="peft",
        base_model=base_model if base_model and not is_local(base_model) else None,
        tags=list(dict.fromkeys(tags)),
        pipeline_tag=_PIPELINE_TAGS.get(str(getattr(task_type, "value", task_type))),
    )
    return f"---\n{data.to_yaml().strip()}\n---\n"


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # run from a checkout
            continue
    return f"Versions: {', '.join(found)}."
