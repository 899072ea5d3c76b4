"""Uploading to the Hub: one commit or nothing, and advice where it fails."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers


def upload(
    repo_id: str,
    write: Callable[[Path], None],
    *,
    token: bool | str | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str,
    commit_description: str | None,
) -> CommitInfo:
    """Upload the folder that `write` fills; the other arguments are those of `LoraExport.push_to_hub`.

    Raises:
        ValueError: without a token, before anything is written or sent; or as `write`.
        HfHubHTTPError: if the Hub refuses.
        ConnectionError: if the connection was lost.
    """
    if "authorization" not in build_hf_headers(token=token):
        raise ValueError(
            f"Uploading to {repo_id!r} takes a token with write access. Log in with `hf auth login`, set HF_TOKEN, or "
            "pass token=; tokens are made at https://huggingface.co/settings/tokens."
        )
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "lora"
        write(folder)
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
