"""`LoraExport.push_to_hub` against a local server that speaks the part of the Hub's API that an upload uses."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import close_session
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_reslora.export import LoraExport, export_lora

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN, OID = "hf_local", "0" * 40
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


class Hub(ThreadingHTTPServer):
    """One account, `me`, with repositories of committed files.

    Answers `create_repo`, `create_branch`, `validate-yaml`, `preupload`, the LFS batch with its upload and verify, and
    `commit`. The way it takes a commit, whole or not at all, is the Hub's.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[str] = []
        self.repos: dict[str, dict[str, bytes]] = {}
        self.settings: dict[str, Any] = {}
        self.commits: list[dict[str, Any]] = []
        self.blobs: dict[str, bytes] = {}
        self.break_at: str | None = None  # a part of the address at which the connection is cut
        self.read_only = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is cut is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: object = None) -> None:
        content = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle_call(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.calls.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if hub.break_at is not None and hub.break_at in path:
            self.rfile.read(size // 2)
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = self.rfile.read(size)
        if path.startswith("/blob/"):  # the storage takes no token, its addresses are signed
            hub.blobs[path.removeprefix("/blob/")] = body
            return self.answer(200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create_repo(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer(200, {"objects": [self.upload_of(thing) for thing in json.loads(body)["objects"]]})
        if path == "/verify":
            known = json.loads(body)
            return self.answer(200 if len(hub.blobs[known["oid"]]) == known["size"] else 422)
        *_, owner, name, action, revision = path.split("/")
        if hub.repos.get(f"{owner}/{name}") is None:  # also what `repo_info` asks for after a 403
            return self.answer(404, {"error": "Repository not found"})
        if action == "branch":
            hub.settings["branch"] = revision
            return self.answer(200)
        if action == "preupload":
            return self.answer(200, {"files": [self.mode_of(file) for file in json.loads(body)["files"]]})
        assert action == "commit"
        return self.commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()], revision)

    do_GET = do_POST = do_PUT = handle_call

    def create_repo(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if self.server.read_only or not repo_id.startswith("me/"):
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        existed = repo_id in self.server.repos
        self.server.repos.setdefault(repo_id, {})
        self.server.settings.update(asked)
        return self.answer(409 if existed else 200, {"url": f"{self.server.url}/{repo_id}"})

    def mode_of(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def upload_of(self, thing: dict[str, Any]) -> dict[str, Any]:
        if thing["oid"] in self.server.blobs:
            return thing
        actions = {"upload": {"href": f"{self.server.url}/blob/{thing['oid']}"}}
        return {**thing, "actions": {**actions, "verify": {"href": f"{self.server.url}/verify"}}}

    def commit(self, repo_id: str, lines: list[dict[str, Any]], revision: str) -> None:
        files = {}
        for line in lines[1:]:
            value = line["value"]
            content = base64.b64decode(value["content"]) if line["key"] == "file" else self.server.blobs[value["oid"]]
            assert line["key"] == "file" or hashlib.sha256(content).hexdigest() == value["oid"]
            files[value["path"]] = content
        self.server.repos[repo_id].update(files)
        pull = "create_pr=1" in self.path
        self.server.commits.append({**lines[0]["value"], "revision": revision, "create_pr": pull})
        url = f"{self.server.url}/{repo_id}"
        answer = {"commitUrl": f"{url}/commit/{OID}", "commitOid": OID}
        self.answer(200, {**answer, "pullRequestUrl": f"{url}/discussions/1" if pull else None})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no" / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no" / "tokens"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the tries of a lost connection
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert not list((tmp_path / "temporary").iterdir()), "what was uploaded is not left behind"


@pytest.fixture(scope="module")
def export() -> LoraExport:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(20, 30)), LoraConfig(r=3, target_modules=["0"]))
    return export_lora(model)


def test_the_repository_holds_the_folder(export: LoraExport, hub: Hub, tmp_path: Path) -> None:
    export.save_pretrained(tmp_path / "lora", command="peft-reslora export")
    url = export.push_to_hub("lora", token=TOKEN, private=True, command="peft-reslora export")
    assert str(url) == f"{hub.url}/me/lora/commit/{OID}"
    assert hub.repos == {"me/lora": {p.name: p.read_bytes() for p in (tmp_path / "lora").iterdir()}}
    assert hub.repos["me/lora"].keys() == FILES
    assert hub.settings["visibility"] == "private"
    assert hub.commits == [{"summary": "Upload LoRA", "description": "", "revision": "main", "create_pr": False}]
    oid = hashlib.sha256(hub.repos["me/lora"]["adapter_model.safetensors"]).hexdigest()
    assert hub.calls[0] == "POST /api/repos/create"
    assert hub.calls[-1] == "POST /api/models/me/lora/commit/main"
    assert set(hub.calls[1:-1]) == {
        "POST /api/validate-yaml",
        "POST /api/models/me/lora/preupload/main",
        "POST /me/lora.git/info/lfs/objects/batch",
        f"PUT /blob/{oid}",
        "POST /verify",
    }


def test_an_existing_repository_is_added_to(export: LoraExport, hub: Hub) -> None:
    hub.repos["me/lora"] = {"notes.txt": b"mine", "README.md": b"old"}
    arguments = {"commit_message": "Second", "commit_description": "Longer", "revision": "v2"}
    export.push_to_hub("me/lora", token=TOKEN, **arguments)
    assert hub.repos["me/lora"].keys() == {*FILES, "notes.txt"}
    assert hub.repos["me/lora"]["README.md"] != b"old"
    assert hub.settings["branch"] == "v2"
    assert hub.commits == [{"summary": "Second", "description": "Longer", "revision": "v2", "create_pr": False}]


def test_a_pull_request_is_opened(export: LoraExport, hub: Hub) -> None:
    commit = export.push_to_hub("lora", token=TOKEN, create_pr=True)
    assert hub.commits[0]["create_pr"]
    assert commit.pr_url == f"{hub.url}/me/lora/discussions/1"


def test_the_token_of_a_login_is_used(export: LoraExport, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export.push_to_hub("lora")
    assert hub.repos["me/lora"].keys() == FILES


@pytest.mark.parametrize("token", [None, False])
def test_without_a_token_nothing_is_sent(export: LoraExport, hub: Hub, token: bool | None) -> None:
    with pytest.raises(ValueError, match=r"'me/lora' takes a token with write access.*hf auth login.*HF_TOKEN"):
        export.push_to_hub("me/lora", token=token)
    assert hub.calls == []


@pytest.mark.parametrize(("repo_id", "token"), [("other/lora", TOKEN), ("me/lora", "hf_wrong"), ("me/lora", TOKEN)])
def test_what_the_hub_refuses_says_what_to_do(export: LoraExport, hub: Hub, repo_id: str, token: str) -> None:
    hub.read_only = True
    with pytest.raises(HfHubHTTPError, match=f"The token has no write access to '{repo_id}', and nothing was upload"):
        export.push_to_hub(repo_id, token=token)
    assert hub.repos == {}


@pytest.mark.parametrize("step", ["create", "validate-yaml", "preupload", "objects/batch", "blob", "verify", "commit"])
def test_a_lost_connection_leaves_nothing_by_half(export: LoraExport, hub: Hub, step: str) -> None:
    hub.break_at = step
    with pytest.raises(ConnectionError, match=r"upload to '(me/)?lora' broke off \(.+\).*Call push_to_hub again"):
        export.push_to_hub("lora", token=TOKEN)
    assert hub.commits == []
    assert hub.repos.get("me/lora", {}) == {}
    hub.break_at = None
    export.push_to_hub("lora", token=TOKEN)
    assert hub.repos["me/lora"].keys() == FILES


def test_an_offline_mode_is_told(export: LoraExport, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        export.push_to_hub("lora", token=TOKEN)
    assert hub.calls == []


def test_an_export_that_fails_its_proof_is_not_uploaded(export: LoraExport, hub: Hub) -> None:
    with pytest.raises(ValueError, match="does not load onto the base model"):
        export.push_to_hub("lora", token=TOKEN, base_model=nn.Sequential(nn.Linear(20, 31)))
    assert hub.calls == []
