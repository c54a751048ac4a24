"""Damaged model files: named and refused in one line, by the engine and before a reload."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantizer.export import write_sums
from server.checkpoint_files import check_lengths, read_sums, verified, verify_sums
from server.config import EngineConfig
from server.engine.engine import build_engine
from server.model_config import ModelError
from tests.awq_checkpoints import make_awq_checkpoint
from tests.tiny_models import add_tokenizer, make_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_model(tmp_path_factory.mktemp("source"), "llama", torch.float16, max_shard_size="100KB")
    add_tokenizer(directory)
    write_sums(directory)
    return directory


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(model: Path, **fields: object) -> None:
    build_engine(
        EngineConfig(str(model), max_model_len=64, kernel_backend="reference", threads=1, **fields)  # type: ignore[arg-type]
    )


def shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def test_what_the_quantizer_writes_sha256sum_reads(model: Path) -> None:
    assert len(shards(model)) > 1
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=model, check=True, capture_output=True)
    assert read_sums(model).keys() == {path.name for path in shards(model)}
    assert verify_sums(model) == len(shards(model))
    check_lengths(model)
    load(model)


@pytest.mark.parametrize("place", ["header", "middle", "end"])
def test_a_flipped_bit_is_named(model: Path, place: str) -> None:
    file = shards(model)[1]
    flip(file, {"header": 30, "middle": file.stat().st_size // 2, "end": -1}[place])
    for check in (load, verify_sums):
        with pytest.raises(ModelError, match=rf"{file.name}: damaged: its SHA-256 is [0-9a-f]{{64}}, SHA256SUMS says"):
            check(model)
    if place != "header":
        load(model, verify_checksums=False)


def test_truncated_files_are_named(model: Path) -> None:
    file = shards(model)[0]
    content = file.read_bytes()
    for length in (0, 5, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ModelError, match=f"{file.name}: not a complete safetensors file"):
            check_lengths(model)
        for verify in (True, False):
            with pytest.raises(ModelError, match=file.name) as error:
                load(model, verify_checksums=verify)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_truncated_json_is_named(model: Path, name: str) -> None:
    content = (model / name).read_text()
    (model / name).write_text(content[: len(content) // 2])
    with pytest.raises(ModelError, match=name) as error:
        load(model)
    assert "\n" not in str(error.value)


def test_sums_that_are_none_are_refused_and_missing_ones_are_not(model: Path) -> None:
    (model / "SHA256SUMS").write_text("0123  model.safetensors\n")
    with pytest.raises(ModelError, match="SHA256SUMS: line 1"):
        load(model)
    (model / "SHA256SUMS").write_text(f"{'0' * 64}  README.md\n")
    assert verify_sums(model) == 0
    (model / "SHA256SUMS").unlink()
    assert read_sums(model) == {}
    load(model)


def test_another_fault_of_the_load_is_told_as_it_is(model: Path) -> None:
    with pytest.raises(ZeroDivisionError), verified(model):
        _ = 1 / 0
    flip(shards(model)[0], -1)
    with pytest.raises(ModelError, match="damaged"), verified(model):
        _ = 1 / 0


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tmp_path / "awq"
    make_awq_checkpoint(make_tiny_model(tmp_path / "plain", "llama"), model, tmp_path / "dense", 32)
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.scales"))
    tensors[name][0, 3] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"model.safetensors: tensor {name}: holds a scale that is not finite"):
        load(model)
