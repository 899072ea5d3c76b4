"""A standard LoRA checkpoint: written whole or not at all, and read back as proof."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_reslora.export.card import lora_card
from peft_reslora.export.report import ExportReport
from peft_reslora.shared.folders import replaced_folder
from peft_reslora.shared.saving import CONFIG_FILE, WEIGHTS_FILE

PREFIX = "base_model.model."
CARD_FILE, DIFFUSERS_FILE = "README.md", "pytorch_lora_weights.safetensors"
_OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, DIFFUSERS_FILE)
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

    Args:
        config: a plain `LoraConfig`.
        state_dict: `base_model.model.<module>.lora_A.weight` (r, in_features), `.lora_B.weight` (out_features, r).
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
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                found[name.removeprefix(PREFIX)] = A.shape[1], self.state_dict[f"{name}.lora_B.weight"].shape[0]
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
        if "authorization" not in build_hf_headers(token=token):
            raise ValueError(
                f"Uploading to {repo_id!r} takes a token with write access. Log in with `hf auth login`, set "
                "HF_TOKEN, or pass token=; tokens are made at https://huggingface.co/settings/tokens."
            )
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "lora"
            self.save_pretrained(folder, base_model, command=command)
            with _advice_on_failure(repo_id):
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None and not create_pr and not revision.startswith("refs/pr"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                return api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    commit_description=commit_description,
                    revision=revision,
                    create_pr=create_pr,
                )

    def _config_json(self) -> str:
        fields = {name: getattr(self.config, name) for name in _CONFIG_FIELDS}
        fields["target_modules"] = sorted(fields["target_modules"])
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"


@contextmanager
def _advice_on_failure(repo_id: str) -> Iterator[None]:
    """Say what to do about an upload that failed; only the Hub's own answers keep their class."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            error.append_to_message(
                f"\nThe token has no write access to {repo_id!r}, and nothing was uploaded. Pass the token of another "
                "account, give it write access at https://huggingface.co/settings/tokens, or take another repo_id."
            )
        raise
    except (OSError, ValueError):  # offline mode, an impossible repo_id: these say what to do
        raise
    except Exception as error:  # a lost connection has another class for each step and release of huggingface_hub
        raise ConnectionError(
            f"The upload to {repo_id!r} broke off ({error.__cause__ or error}). The Hub takes a commit whole or not "
            "at all, so no file of it is there by half. Call push_to_hub again: files that are there already are not "
            "sent a second time."
        ) from error


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
    if fields != sorted(_CONFIG_FIELDS):
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
        A, B = (state_dict[f"{name}.lora_{factor}.weight"].float() for factor in "AB")
        x = torch.randn(4, A.shape[1], generator=generator)
        lora_A, lora_B = layer.lora_A["default"].float().cpu(), layer.lora_B["default"].float().cpu()
        read, expected = layer.scaling["default"] * lora_B(lora_A(x)), x @ A.T @ B.T
        if not torch.allclose(read, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())):
            raise ValueError(
                f"Read back with PEFT, layer {name.removeprefix(PREFIX)!r} computes something else than was exported."
            )
