"""Uploads to the Hugging Face hub, received by a stand-in on this machine that answers the same HTTP requests."""

import base64
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from families import make
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur import checkpoint, modeling_per_layer
from secateur.discovery import discover
from secateur.plan import PruningPlan
from secateur.surgery import slice

NAME = "org/pruned-model"
TOKEN = "hf_of_a_test"
COMMIT = "c" * 40


class Receiver(BaseHTTPRequestHandler):
    """Creates repositories and takes commits whose files come inline; whatever else is asked for does not exist."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server.hub
        hub.tokens.add(self.headers["Authorization"])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            hub.files.setdefault(f"{asked['organization']}/{asked['name']}", {})
            self.answer({"url": f"{hub.endpoint}/{asked['organization']}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", self.path):
            assert found[1] in hub.files
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file["path"], **mode} for file in json.loads(body)["files"]]})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/commit/main", self.path):
            for key, value in ((line["key"], line["value"]) for line in map(json.loads, body.splitlines())):
                if key == "file":
                    hub.files[found[1]][value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{hub.endpoint}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.absent()

    def do_GET(self):
        self.absent()

    do_HEAD = do_GET  # noqa: N815

    def absent(self):
        self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})

    def answer(self, what, status=200, headers=()):
        content = json.dumps(what).encode()
        self.send_response(status)
        for name, value in {
            **dict(headers),
            "Content-Type": "application/json",
            "Content-Length": len(content),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


class Hub:
    """What the stand-in was given: repository -> path -> content."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.files = {}
        self.tokens = set()

    def folder(self, name, place):
        for path, content in self.files[name].items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)
        return place


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, in place of the hub for everything that this process sends; nothing else can be reached."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    look_up = socket.getaddrinfo

    def only_here(host, *arguments, **options):
        assert host == "127.0.0.1", f"a test tried to reach {host}"
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.hub.endpoint)
    template = f"{server.hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    huggingface_hub.close_session()
    yield server.hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def pruned(per_layer, **sizes):
    """A model that lost FFN channels, more of them in each later layer if `per_layer`."""
    model = make("llama", num_hidden_layers=3, **sizes)
    groups = discover(model)
    families = groups.of_kinds(["ffn_channel"])
    kept = {g.name: tuple(range(4 + g.layer * 4 * per_layer, g.units)) for g in families}
    return slice(model, PruningPlan(kept, {g.name: g.units for g in families}), groups)


def same_logits(folder, model):
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(3, 40)[None]
    return torch.equal(again(ids).logits, model(ids).logits)


def test_a_saved_folder_is_uploaded_and_loads_again(hub, tokenizer, tmp_path):
    model = pruned(per_layer=True, vocab_size=len(tokenizer))
    folder = checkpoint.save(model, tmp_path / "saved", tokenizer=tokenizer, plan=PruningPlan({}, {}), results={})
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo(NAME)
    done = api.upload_folder(repo_id=NAME, folder_path=folder)
    assert done.oid == COMMIT and hub.tokens == {f"Bearer {TOKEN}"}
    assert set(hub.files[NAME]) == {file.name for file in folder.iterdir()}
    assert {"plan.json", "results.json", "README.md", "modeling_per_layer.py"} < set(hub.files[NAME])
    got = hub.folder(NAME, tmp_path / "got")
    assert same_logits(got, model)
    assert AutoTokenizer.from_pretrained(got, trust_remote_code=True)("the old") == tokenizer("the old")


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_pruned_model_is_pushed_and_loads_again(hub, per_layer, tmp_path):
    model = pruned(per_layer)
    model.push_to_hub(NAME, token=TOKEN, tags=["pruned"])
    assert list(hub.files) == [NAME]
    code = {"modeling_per_layer.py": Path(modeling_per_layer.__file__).read_bytes()} if per_layer else {}
    assert {path: content for path, content in hub.files[NAME].items() if path.endswith(".py")} == code
    assert b"- pruned" in hub.files[NAME]["README.md"]
    assert same_logits(hub.folder(NAME, tmp_path / "got"), model)
