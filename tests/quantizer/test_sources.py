from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantizer.config import QuantizeError
from quantizer.mappings import ARCHITECTURES, find_architecture
from quantizer.sources import check_tensors, load_checked, open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_sharded_and_single_file_checkpoints_read_the_same(make_checkpoint: Callable[..., Path]) -> None:
    single = open_source(str(make_checkpoint("qwen2", name="single")))
    folder = make_checkpoint("qwen2", name="sharded", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    sharded = open_source(str(folder))
    shapes = check_tensors(sharded)
    assert shapes == check_tensors(single) and "lm_head.weight" not in shapes
    for name, shape in shapes.items():
        assert torch.equal(load_checked(single, name, shape), load_checked(sharded, name, shape))


def _edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"{NORM} is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (lambda tensors: tensors.update({NORM: torch.zeros(3)}), rf"{NORM}: expected shape \[64\], found \[3\]"),
        (lambda tensors: tensors.update({NORM: torch.zeros(64, dtype=torch.int8)}), f"{NORM}: expected floating"),
        (lambda tensors: tensors[NORM].fill_(torch.nan), f"{NORM}: holds infinite"),
    ],
)
def test_a_wrong_tensor_is_named(
    make_checkpoint: Callable[..., Path], edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = make_checkpoint("llama")
    _edit_tensors(folder, edit)
    source = open_source(str(folder))
    with pytest.raises(QuantizeError, match=message):
        for name, shape in check_tensors(source).items():
            load_checked(source, name, shape)


def test_legacy_buffers_and_a_stored_tied_head_are_left_out(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama")
    _edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            }
        ),
    )
    assert "lm_head.weight" not in check_tensors(open_source(str(folder)))


def test_broken_folders_are_explained(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="no such file or folder"):
        open_source("nowhere")
    with pytest.raises(QuantizeError, match=r"no config\.json"):
        open_source(str(tmp_path))
    folder = make_checkpoint("llama")
    with pytest.raises(QuantizeError, match="--revision main"):
        open_source(str(folder), revision="main")
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(QuantizeError, match="not a readable safetensors"):
        open_source(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(QuantizeError, match=r"found pytorch_model\.bin"):
        open_source(str(folder))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(QuantizeError, match="names model-00001-of-00002"):
        open_source(str(folder))


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_quantized_sources_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama")
    _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(QuantizeError, match="already quantized with gptq"):
        open_source(str(folder))


def test_unknown_architectures_are_refused_by_name(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama")
    _edit_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(QuantizeError, match=r"LlamaForSequenceClassification.*Qwen3ForCausalLM"):
        find_architecture(open_source(str(folder)).config)


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_mapping_resolves(architecture: object) -> None:
    assert architecture.layer_type and architecture.rotary_type  # type: ignore[attr-defined]


@contextmanager
def _hub(folder: Path, repository: str, revision: str) -> Iterator[str]:
    """What snapshot_download asks a hub for: repository info, the file tree, and the files."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            files = sorted(file for file in folder.iterdir() if file.is_file())
            if path in (f"/api/models/{repository}/revision/{name}" for name in (revision, COMMIT)):
                body = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
                self._answer(json.dumps(body).encode())
            elif path.startswith(f"/api/models/{repository}/tree/{COMMIT}"):
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": f"{number:040x}"}
                    for number, file in enumerate(files)
                ]
                self._answer(json.dumps(tree).encode())
            elif path.startswith(f"/{repository}/resolve/"):
                file = folder / path.rsplit("/", 1)[1]
                self._answer(file.read_bytes(), etag=f"{files.index(file):040x}")
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _answer(self, body: bytes, etag: str | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if etag:
                self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_OPEN = """
import sys
from quantizer.config import QuantizeError
from quantizer.sources import check_tensors, open_source
for revision, mode in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        source = open_source(sys.argv[1], revision, offline=mode == "offline")
        print(source.description, len(check_tensors(source)), len(source.tokenizer()))
    except QuantizeError as error:
        print("refused:", str(error).replace("\\n", " "))
"""


def test_hub_repositories_by_revision_and_then_offline(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3")
    num_tensors = len(check_tensors(open_source(str(folder))))

    def open_in_process(endpoint: str, *revisions_and_modes: str) -> list[str]:
        # Another process, because huggingface_hub reads its environment at import.
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub")}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-c", _OPEN, "owner/tiny", *revisions_and_modes]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    with _hub(folder, "owner/tiny", "v1") as endpoint:
        lines = open_in_process(endpoint, "v1", "offline", "v1", "online", "v2", "online")
    assert lines[0].startswith("refused: owner/tiny@v1: not found in the local cache")
    assert lines[1] == f"owner/tiny@v1 {num_tensors} 320"
    assert lines[2].startswith("refused: owner/tiny@v2")
    assert open_in_process(endpoint, "v1", "offline") == [f"owner/tiny@v1 {num_tensors} 320"]
