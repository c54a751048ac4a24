"""Kernels run in Triton's interpreter here. The variable must be set before triton is first imported in this process. And an
engine on a fake CUDA device, with checkpoints for it."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from tests.gpu import interpreter

interpreter.install()

from kernels.gpu.tensors import GpuSampledRows
from server.models.checkpoint import Checkpoint
from tests.awq_checkpoints import make_awq_checkpoint
from tests.gpu.devices import FakeCudaDevice, WithoutDeviceGuards
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("placement")
    make_tiny_model(root / "source", "llama-untied-biased", head_dim=16)
    make_awq_checkpoint(root / "source", root / "awq", root / "dense", 32, skip=("layers.1.self_attn.k_proj",))
    return root / "awq"


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough sums that they are split over programs."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 1024, "intermediate_size": 1536, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    make_tiny_model(root / "source", "qwen3", head_dim=128, **sizes)
    make_awq_checkpoint(root / "source", root / "awq", root / "dense", 128)
    return root / "awq"


@pytest.fixture(scope="module")
def mixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a shared expert, and widths that do not fill a tile."""
    root = tmp_path_factory.mktemp("mixture")
    make_tiny_model(root / "source", "qwen2_moe", num_hidden_layers=2)
    make_awq_checkpoint(root / "source", root / "awq", root / "dense", 32)
    return root / "awq"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudaDevice]:
    device = FakeCudaDevice()
    monkeypatch.setattr("kernels.gpu.device.open_device", lambda: device)

    def to_host(self: GpuSampledRows) -> tuple[list[int], list[bool]]:
        # Values are what fake tensors lack: every row samples token 7.
        self.device.wait(self.ticket)
        assert self.host.device.type == "cpu"
        num_rows = self.token_ids.shape[0]
        return [7] * num_rows, [True] * num_rows

    monkeypatch.setattr(GpuSampledRows, "to_host", to_host)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    read = Checkpoint.read

    def read_fake(self: Checkpoint, name: str) -> Tensor:
        with unset_fake_temporarily():
            tensor = read(self, name)
        return mode.from_tensor(tensor)

    monkeypatch.setattr(Checkpoint, "read", read_fake)
    with mode, WithoutDeviceGuards():
        yield device
