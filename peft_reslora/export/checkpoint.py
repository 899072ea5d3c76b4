"""A standard LoRA checkpoint: written whole or not at all, and read back as proof."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_reslora.export.fitting import Fit, FittedUpdate
from peft_reslora.export.forms import EMBEDDING, LINEAR, ParameterForm, form_of_adapted, reads_back
from peft_reslora.export.hub import upload
from peft_reslora.export.report import ExportReport, LayerReport, lora_card
from peft_reslora.shared.card import is_local, method_name
from peft_reslora.shared.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, replaced_folder
from peft_reslora.shared.names import PREFIX
from peft_reslora.shared.precision import full_precision

DORA_PART = "lora_magnitude_vector"  # DoRA's norms, as PEFT names them in a file
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, DIFFUSERS_FILE)
_VLLM_DEFAULT_MAX_RANK = 16
Shapes = Mapping[str, tuple[int, int]]  # (in_features, out_features) by module
# The only fields that are written: PEFT before 0.14 refuses those that it does not know.
_CONFIG_FIELDS = (
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)


@dataclass(frozen=True)
class LoraExport:
    """An adapter as a standard LoRA: `update = B @ A`, every scale in B, one rank for all modules.

    Where DoRA was allowed, `.lora_magnitude_vector` (out_features,) besides.

    Args:
        config: a plain `LoraConfig`.
        state_dict: `base_model.model.<module>.lora_A.weight` (r, in_features), `.lora_B.weight` (out_features, r), for
            convolutions as kernels; of embeddings `.lora_embedding_A` and `.lora_embedding_B`.
        report: per layer, what the conversion kept.
        diffusers_prefix: what a diffusers pipeline puts before the layers' names, such as 'unet' or 'text_encoder',
            for a model that pipelines hold; they read a file of their own.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    report: ExportReport
    diffusers_prefix: str | None = None

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each layer in the file."""
        found: dict[str, tuple[int, int]] = {}
        for key, A in self.state_dict.items():
            for form in (LINEAR, EMBEDDING):
                if key.endswith(f".{form.names[0]}"):
                    name = key.removesuffix(f".{form.names[0]}")
                    found[name.removeprefix(PREFIX)] = A.shape[1], self.state_dict[f"{name}.{form.names[1]}"].shape[0]
        return found

    def pipeline_tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under the names by which a diffusers pipeline reads them: `unet.<module>.lora_A.weight`."""
        return {f"{prefix}.{key.removeprefix(PREFIX)}": tensor for key, tensor in self.state_dict.items()}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        base_model: nn.Module | None = None,
        *,
        command: str | None = None,
    ) -> None:
        """Write the checkpoint and its model card; either the whole folder appears or nothing changes.

        Args:
            save_directory: a new or empty folder, or an earlier export, which is replaced.
            base_model: the bare base model. A copy of it loads the written folder with plain PEFT, and the export
                fails unless every layer then computes what it should.
            command: the shell command to name in the card as what made the checkpoint.

        Raises:
            ValueError: if the folder holds something else, or what was read back differs.
        """
        with replaced_folder(save_directory, _OWN_FILES) as folder:
            _refuse_all_but_exports(Path(save_directory))
            save_file(self.state_dict, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            if self.diffusers_prefix is not None:
                save_file(
                    self.pipeline_tensors(self.diffusers_prefix), folder / DIFFUSERS_FILE, metadata={"format": "pt"}
                )
            (folder / CONFIG_FILE).write_text(self._config_json(), encoding="utf-8")
            (folder / CARD_FILE).write_text(lora_card(self.config, self.report, command), encoding="utf-8")
            if base_model is not None:
                _prove(folder, base_model, self.state_dict)

    def warn(self) -> None:
        """Warn of what the export will meet elsewhere; called by the function that the user called."""
        r, base = self.config.r, self.config.base_model_name_or_path
        sides = {name: min(shape) for name, shape in self.shapes().items()}
        if r > _VLLM_DEFAULT_MAX_RANK:
            warnings.warn(f"The LoRA has r={r}: vLLM needs --max-lora-rank {r} to serve it.", stacklevel=3)
        if narrow := [name for name, side in sides.items() if side < r]:
            warnings.warn(
                f"The LoRA has r={r}, more than the smaller side of {len(narrow)} modules ({narrow[0]}: "
                f"{sides[narrow[0]]}): Ollama's import of an adapter folder would misread them. Convert the folder "
                "with llama.cpp, or export with a lower rank=.",
                stacklevel=3,
            )
        if self.config.target_parameters:
            warnings.warn(
                "The LoRA adapts parameters (target_parameters), which PEFT loads from 0.17 on; programs that read "
                "the factors of linear layers alone misread or refuse them. For these use merge_and_unload().",
                stacklevel=3,
            )
        if self.config.use_dora:
            warnings.warn(
                "The checkpoint is a DoRA (use_dora=True), which PEFT loads; vLLM, SGLang and llama.cpp refuse it. "
                "For these use merge_and_unload().",
                stacklevel=3,
            )
        for note in self.report.notes():
            warnings.warn(note, stacklevel=3)
        if base is not None and is_local(base):
            warnings.warn(
                f"The base model of the LoRA is the local path {base!r}, which others cannot load. Set "
                "export.config.base_model_name_or_path to its Hub id before saving.",
                stacklevel=3,
            )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: nn.Module | None = None,
        command: str | None = None,
        commit_message: str = "Upload LoRA",
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload what `save_pretrained` writes, in one commit: the repository has all of it or nothing.

        Args:
            repo_id: made if it does not exist.
            base_model, command: as for `save_pretrained`.
            commit_message, commit_description, private, token, revision, create_pr: as for PEFT's `push_to_hub`; a
                branch `revision` is made if it does not exist.

        Raises:
            ValueError: without a token, before anything is written or sent; or as `save_pretrained`.
            HfHubHTTPError: if the Hub refuses.
            ConnectionError: if the connection was lost.
        """
        return upload(
            repo_id,
            lambda folder: self.save_pretrained(folder, base_model, command=command),
            token=token,
            private=private,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )

    def _config_json(self) -> str:
        fields = {name: getattr(self.config, name) for name in _CONFIG_FIELDS}
        fields["target_modules"] = sorted(fields["target_modules"])
        if self.config.target_parameters:  # PEFT knows it from 0.17 on
            fields["target_parameters"] = sorted(self.config.target_parameters)
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def _refuse_all_but_exports(folder: Path) -> None:
    """A trained adapter has files of the same names, and cannot be made again from its export.

    Raises:
        ValueError: if the folder holds something else than an earlier export, which has just the fields of one.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        peft_type, fields = config.get("peft_type"), sorted(config)
    except (OSError, ValueError, AttributeError):
        peft_type, fields = None, []
    if [name for name in fields if name != "target_parameters"] != sorted(_CONFIG_FIELDS):
        held = f"an adapter with peft_type {peft_type!r}" if peft_type else "files"
        raise ValueError(
            f"{folder} holds {held}, and no earlier export; the export would replace it. Give another folder."
        )


@torch.no_grad()
def _prove(folder: Path, base_model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load the folder onto a copy of the base model with plain PEFT, and compare what each layer adds to its output.

    Raises:
        ValueError: if a layer is missing, was added, or computes something else.
    """
    if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
        raise ValueError("base_model has an adapter already; give the bare base model to check the export on.")
    if any(tensor.is_meta for tensor in (*base_model.parameters(), *base_model.buffers())):
        raise ValueError("base_model is offloaded or without weights; give one in memory to check the export on.")
    try:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base_model), str(folder))
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"The export does not load onto the base model: {error}") from error
    layers = {f"{PREFIX}{n}": m for n, m in loaded.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    exported = {key.rpartition(".lora_")[0] for key in state_dict}
    if layers.keys() != exported:
        raise ValueError(
            "PEFT adapts other layers of the base model than the export holds: "
            f"{', '.join(sorted(layers.keys() ^ exported)[:5])}. Is it the model that the adapter was trained on?"
        )
    generator = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        form = form_of_adapted(layer)
        A, B = form.matrices((state_dict[f"{name}.{form.names[0]}"], state_dict[f"{name}.{form.names[1]}"]))
        same_norms = _same_norms(layer, state_dict.get(f"{name}.{DORA_PART}"))
        if not (same_norms and reads_back(layer, A.float(), B.float(), generator)):
            raise ValueError(
                f"Read back with PEFT, layer {name.removeprefix(PREFIX)!r} computes something else than was exported."
            )


def _same_norms(layer: Any, exported: Tensor | None) -> bool:
    """Whether PEFT has read the norms of a DoRA, and none where there are none."""
    held = layer.lora_magnitude_vector
    if exported is None or "default" not in held:
        return exported is None and "default" not in held
    read = held["default"].weight.detach()
    return torch.allclose(read.cpu().float(), exported.to(read.dtype).float())


@full_precision()
def assemble(
    updates: Mapping[str, FittedUpdate],
    zeros: Shapes,
    lora_config: LoraConfig,
    fit: Fit,
    source: PeftConfig,
    call: str,
    prefix: str | None,
    norms_of_zeros: Mapping[str, Tensor] | None = None,
) -> LoraExport:
    """Pad all pairs to one rank, and report.

    Args:
        norms_of_zeros: of a DoRA, by layer, those of the rows of the weights that are in the file as zeros.
    """
    r = fit.file_rank(updates)
    lora_config.r = lora_config.lora_alpha = r
    lora_config.inference_mode = True
    pairs = {
        name: (LINEAR, torch.zeros(0, in_features, dtype=fit.dtype), torch.zeros(out_features, 0, dtype=fit.dtype))
        for name, (in_features, out_features) in zeros.items()
    }
    pairs.update({name: (update.form, *update.factors.pair) for name, update in updates.items()})
    state_dict = {}
    for name, (form, A, B) in pairs.items():
        try:
            tensors = form.tensors(A, B, r)
        except ValueError as error:
            raise ValueError(f"Layer {name!r} fits into no plain LoRA: {error}.") from error
        state_dict.update({f"{PREFIX}{name}.{key}": tensor for key, tensor in tensors.items()})
    norms = {n: update.form.norms(update.magnitude) for n, update in updates.items() if update.magnitude is not None}
    lora_config.use_dora = bool(norms)
    for name, magnitude in (norms | dict(norms_of_zeros or {})).items():
        state_dict[f"{PREFIX}{name}.{DORA_PART}"] = magnitude.to("cpu", fit.dtype).contiguous()
    dtype = str(fit.dtype).removeprefix("torch.")
    layers = _layer_reports(updates, fit)
    report = ExportReport(method_name(source), call, r, dtype, layers, list(zeros), is_dora=bool(norms))
    return LoraExport(lora_config, state_dict, report, prefix)


def _layer_reports(updates: Mapping[str, FittedUpdate], fit: Fit) -> list[LayerReport]:
    return [
        LayerReport(
            layer=update.form.path if isinstance(update.form, ParameterForm) else name,
            merge="exact" if update.merge.exact else update.merge.why,
            why=update.merge.why if update.merge.exact else "",
            exact=update.merge.exact and not update.truncated and fit.dtype == torch.float32,
            rank_before=update.rank_before,
            rank_after=update.factors.rank,
            energy_kept=update.energy_kept,
            relative_error=update.relative_error,
            first=update.first,
        )
        for name, update in updates.items()
    ]
