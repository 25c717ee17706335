import base64
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from lit_jax.errors import UserError
from lit_jax.weights import hub

KEY = "config.model.image.model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ASK = f"""
import json
import sys
from lit_jax.weights import hub
from lit_jax.errors import UserError
for model, options in json.loads(sys.argv[1]):
    try:
        print(hub.local_folder(model, config_key="{KEY}", options=hub.HubOptions(**options)))
    except UserError as error:
        print("UserError", error)
"""


def test_a_folder_is_itself(tmp_path):
    assert hub.local_folder(str(tmp_path), config_key=KEY) == tmp_path


def test_the_home_of_an_unknown_user_is_a_user_error():
    with pytest.raises(UserError, match=rf"{KEY}=~nobody-here/x"):
        hub.local_folder("~nobody-here/x", config_key=KEY)


@pytest.mark.parametrize(
    "model",
    [
        "",
        "google/no-such-model",
        "a/b/c",
        "/no/such/folder",
        "./no such folder",
        "x" * 200,
    ],
)
def test_what_is_neither_folder_nor_model_is_a_user_error(model):
    with pytest.raises(UserError, match=KEY) as error:  # the tests' environment is offline
        hub.local_folder(model, config_key=KEY)
    assert repr(model) in str(error.value) or not model
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "../none", "a/b/c", "models/org/x"])
def test_a_path_without_a_folder_is_not_looked_for_on_the_hub(model):
    with pytest.raises(UserError, match="no such folder") as error:
        hub.local_folder(model, config_key=KEY)
    assert error.value.__cause__ is None


SMALL = ["config.json", "vocab.txt", "tokenizer.model"]
SHARDS = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
INDEX = "pytorch_model.bin.index.json"
WEIGHTS = {  # model: (weights that the Hub has, those that are needed)
    "org/all": (
        ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin", "onnx/model.onnx"],
        ["model.safetensors"],
    ),
    "org/flax": (
        ["flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"],
        ["flax_model.msgpack"],
    ),
    "org/shards": ([INDEX, *SHARDS], [INDEX, *SHARDS]),
}
# A repository that wants a token, and has other files in the branch 'next'.
PRIVATE, TOKEN, NEXT_COMMIT = "org/private", "hf_secret", "f" * 40
ALL = {"revision": "next", "subfolder": "inner", "variant": "fp16"}
NEXT = [
    "inner/config.json",
    "inner/model.fp16.safetensors",
    "inner/model.safetensors",
    "model.fp16.safetensors",
]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: listings of repositories, and files."""

    fetched: ClassVar[list[str]] = []

    def do_GET(self):
        path = r"/(api/models/)?(org/\w+)(/(tree|resolve|revision)/(\w+)/?)?([^?]*)"
        match = re.match(path, self.path)
        assert match
        model, action, revision, file = match.group(2, 4, 5, 6)
        if model == PRIVATE and self.headers["Authorization"] == f"Bearer {TOKEN}":
            files, commit = NEXT, NEXT_COMMIT
            assert revision in ("next", NEXT_COMMIT)
        elif model in WEIGHTS:
            files, commit = [*SMALL, *WEIGHTS[model][0], "README.md"], COMMIT
        else:
            self.answer(b"", 401, {"X-Error-Code": "RepoNotFound"})
            return
        if action == "tree":
            tree = [{"type": "file", "path": f, "size": len(f), "oid": f} for f in files]
            self.answer(json.dumps(tree).encode())
        elif action == "resolve":
            if self.command == "GET":
                self.fetched.append(f"{model}/{file}")
            self.answer(file.encode(), 200, {"X-Repo-Commit": commit, "ETag": f'"{file}"'})
        else:
            siblings = [{"rfilename": file} for file in files]
            self.answer(json.dumps({"id": model, "sha": commit, "siblings": siblings}).encode())

    def do_HEAD(self):
        self.do_GET()

    def answer(self, content: bytes, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Asks for models with a cache of its own and in a process of its own: huggingface_hub reads its
    environment when it is imported.
    """
    cache = tmp_path_factory.mktemp("cache")

    def ask(models, **environment) -> list[str]:
        """Ask for (model, options) each; a name alone has no options."""
        pairs = [(model, {}) if isinstance(model, str) else model for model in models]
        result = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(pairs)],
            env={**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout.splitlines()

    return ask


@pytest.fixture(scope="module")
def downloaded(ask) -> list[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        # The refused one first: what was downloaded once is taken from the cache.
        private = [(PRIVATE, ALL | {"token": token}) for token in ("hf_other", TOKEN)]
        address = f"http://127.0.0.1:{server.server_port}"
        return ask([*WEIGHTS, *private, "org/other"], HF_ENDPOINT=address)
    finally:
        server.shutdown()
        server.server_close()


def test_only_what_is_needed_is_downloaded(downloaded):
    for (model, (_, needed)), folder in zip(WEIGHTS.items(), downloaded, strict=False):
        assert sorted(path.name for path in pathlib.Path(folder).iterdir()) == sorted(
            SMALL + needed
        )
        assert {f"{model}/{file}" for file in SMALL + needed} <= set(Hub.fetched)
    public = [file for file in Hub.fetched if not file.startswith(PRIVATE)]
    assert len(public) == sum(len(SMALL + needed) for _, needed in WEIGHTS.values())


def test_revision_token_subfolder_and_variant_choose_the_copy(downloaded):
    folder = pathlib.Path(downloaded[len(WEIGHTS) + 1])
    assert folder.parts[-2:] == (NEXT_COMMIT, "inner")
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.fp16.safetensors"}
    assert [file.name for file in folder.parent.iterdir()] == ["inner"]
    assert (folder / "config.json").read_text() == "inner/config.json"


def test_a_wrong_token_is_a_user_error_without_the_token(downloaded):
    refused = downloaded[len(WEIGHTS)]
    assert refused.startswith(f"UserError {KEY} is '{PRIVATE}'")
    assert "hf_other" not in refused


def test_a_model_that_the_hub_does_not_have_is_a_user_error(downloaded):
    assert downloaded[-1].startswith(f"UserError {KEY} is 'org/other'")
    assert len(downloaded) == len(WEIGHTS) + 3


def test_what_was_downloaded_is_there_offline(ask, downloaded):
    assert ask(WEIGHTS, HF_HUB_OFFLINE="1") == downloaded[: len(WEIGHTS)]


@pytest.mark.long
def test_what_was_downloaded_is_there_without_network(ask, downloaded):
    nothing_listens_here = "http://127.0.0.1:9"
    assert ask(WEIGHTS, HF_ENDPOINT=nothing_listens_here) == downloaded[: len(WEIGHTS)]


def test_config_has_defaults_and_extra_keys(copied):
    folder = copied("dual_torch")
    content = json.loads((folder / "config.json").read_text())
    del content["vision_config"]["layer_norm_eps"]
    content |= {"logit_bias": -9.75, "lit_jax": {"image_pooling": "cls"}}
    (folder / "config.json").write_text(json.dumps(content))
    config = hub.read_config(folder)
    assert config["model_type"] == "vision-text-dual-encoder"
    assert config["vision_config"]["model_type"] == "vit"
    assert config["vision_config"]["layer_norm_eps"] == 1e-12
    assert config["text_config"]["hidden_size"] == 8
    assert config["logit_bias"] == -9.75
    assert config["lit_jax"] == {"image_pooling": "cls"}
    assert str(folder) not in json.dumps(config)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"model_type": "no-such"}',
        '{"model_type": 5}',
        '{"model_type": "vit", "hidden_size": "wide"}',
        '{"model_type": "my-own", "auto_map": {"AutoConfig": "code.MyConfig"}}',
        b"\xff\xfe",
    ],
)
def test_a_bad_config_is_a_user_error(tmp_path, content):
    (tmp_path / "config.json").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    (tmp_path / "code.py").write_text("raise SystemExit('this code must not run')")
    refusal = (
        r"config\.json (is not a config\.json that transformers|has no model_type|"
        r"has model_type '(my-own|no-such)')"
    )
    with pytest.raises(UserError, match=refusal) as error:
        hub.read_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_config_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        hub.read_config(tmp_path)


PREFIX = "config.model.text.overrides."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": "false"}, rf"^{PREFIX}is_decoder .*'false'; .* bool"),
        ({"layer_norm_eps": None}, rf"^{PREFIX}layer_norm_eps .*None; .* float"),
        ({"num_attention_heads": 3}, rf"^{PREFIX}num_attention_heads .*3, .* hidden_size .*, 8"),
        ({"hidden_size": 9}, rf"^num_attention_heads .*2, .* {PREFIX}hidden_size, 9"),
        ({"hiden_size": 9}, rf"^{PREFIX}hiden_size .*'hidden_size'"),
        # A field of transformers alone.
        ({"use_cache": "no"}, rf"^{PREFIX}use_cache .*use_cache' .*bool, .*str"),
    ],
)
def test_an_override_is_checked_against_the_field_and_named_by_its_key(golden, changes, message):
    hf = hub.read_config(golden / "bert_torch")
    with pytest.raises(UserError, match=message) as error:
        hub.override(hf, changes, PREFIX)
    assert len(str(error.value).splitlines()) == 1


def test_an_override_is_of_the_type_that_transformers_takes(golden):
    hf = hub.read_config(golden / "bert_torch")
    changed = hub.override(hf, {"layer_norm_eps": 1, "use_cache": False}, PREFIX)
    assert isinstance(changed["layer_norm_eps"], float)
    assert changed == hf | {"layer_norm_eps": 1.0, "use_cache": False}


def test_a_damaged_config_names_the_field_and_the_type_it_needs(copied):
    folder = copied("bert_torch")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"num_hidden_layers": 2.0}))
    with pytest.raises(UserError, match=r"'num_hidden_layers' .*int, .*float"):
        hub.read_config(folder)


class HubToPushTo(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs."""

    committed: ClassVar[dict[str, bytes]] = {}
    tokens: ClassVar[set[str]] = set()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        url = f"http://{self.headers['Host']}/org/new"
        if self.path == "/api/repos/create":
            answer = {"url": url, "name": "org/new"}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": path, **mode} for path in paths]}
        else:
            for line in filter(None, body.split(b"\n")):
                value = json.loads(line)["value"]
                if "path" in value:
                    self.committed[value["path"]] = base64.b64decode(value["content"])
            answer = {"commitUrl": f"{url}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


PUSH = """
import sys
from lit_jax.weights import hub
from lit_jax.errors import UserError
try:
    print(hub.upload(sys.argv[1], "org/new", token="hf_secret", commit_message="epoch 1"))
except UserError as error:
    print("UserError", error)
"""


def push(folder, **environment) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


def test_a_folder_is_pushed_file_by_file(tmp_path):
    files = {"config.json": b"{}", "inner/vocab.txt": b"a\nb\n"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubToPushTo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = push(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert address.endswith(f"/org/new/commit/{COMMIT}")
    assert HubToPushTo.committed == files
    assert HubToPushTo.tokens == {"Bearer hf_secret"}


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path):
    said = push(tmp_path, HF_HUB_OFFLINE="1")
    assert said.startswith("UserError 'org/new' ")
    assert len(said.splitlines()) == 1
    assert "hf_secret" not in said


def test_a_pipe_or_a_device_in_the_folder_of_a_model_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        hub.local_folder(str(tmp_path), config_key="model")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"config\.json"):
        hub.local_folder(str(tmp_path), config_key="model")
