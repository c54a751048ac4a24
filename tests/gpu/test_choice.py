"""Which back end is chosen on which device, and what is refused, on a machine without a GPU and with a stand-in for one."""

from __future__ import annotations

import pytest
import torch

from kernels import bench
from kernels.backend import BackendOptions
from kernels.choice import create_backend
from kernels.gpu.backend import GpuBackend
from kernels.gpu.device import Staging
from kernels.gpu.tuning import CHIPS, MAX_PARTIAL_ROWS, attention_segment, graph_buckets
from server.options import parse_options
from tests.gpu.devices import HostDevice

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these speak of machines without a GPU")


def test_without_a_gpu_auto_takes_the_cpu_and_the_rest_says_why() -> None:
    assert create_backend("auto", BackendOptions(num_threads=1)).device.type == "cpu"
    for name, device in (("gpu", "auto"), ("auto", "cuda"), ("gpu", "cuda")):
        with pytest.raises(ValueError, match="kernel backend 'gpu': no CUDA device is visible"):
            create_backend(name, BackendOptions(device=device))
    for name, options, message in (
        ("gpu", BackendOptions(device="cpu"), "'gpu' does not run on device 'cpu'"),
        ("cpu", BackendOptions(device="cuda"), "'cpu' does not run on device 'cuda'"),
        ("reference", BackendOptions(device="cuda"), "'reference' does not run on device 'cuda'"),
        ("reference", BackendOptions(dtype="bfloat16"), "dtype 'bfloat16': only GPU"),
        ("auto", BackendOptions(device="tpu"), "device 'tpu': expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            create_backend(name, options)


def test_with_a_gpu_auto_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.gpu.device.open_device", HostDevice)
    assert isinstance(create_backend("auto", BackendOptions()), GpuBackend)
    assert create_backend("auto", BackendOptions(device="cpu", num_threads=1)).name != "gpu"


def test_what_a_chip_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="T4 has no bfloat16"):
        GpuBackend(BackendOptions(dtype="bfloat16"), HostDevice(CHIPS["T4"]))
    with pytest.raises(ValueError, match="kv_cache_dtype 'fp8'"):
        GpuBackend(BackendOptions(kv_cache_dtype="fp8"), HostDevice())


def test_the_options_reach_the_engine() -> None:
    config = parse_options(["model", "--device", "cuda", "--dtype", "bfloat16", "--batch-invariant"], {}).engine
    assert (config.device, config.dtype, config.batch_invariant) == ("cuda", "bfloat16", True)
    assert parse_options(["model", "--gpu-memory-utilization", "0.8"], {}).engine.memory_utilization == 0.8


def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda"]) == 1
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_buckets_and_segments() -> None:
    assert graph_buckets(1) == [1] and graph_buckets(6) == [1, 2, 4, 6]
    assert graph_buckets(100)[-3:] == [80, 96, 100]
    chip = CHIPS["H100-SXM"]
    for sequences in (1, 16, 256):
        for max_keys in (64, 4096, 131072):
            segment = attention_segment(chip, sequences, 8, max_keys)
            assert segment % 64 == 0 and max_keys / segment <= 128
            assert sequences * -(-max_keys // segment) <= MAX_PARTIAL_ROWS
    assert len({attention_segment(chip, n, 8, 4096, batch_invariant=True) for n in (1, 16, 256)}) == 1


def test_a_buffer_in_flight_is_not_written() -> None:
    """Steps that sample nothing wait for nothing: the next one's buffers must not overtake the copy of the last."""

    class Slow(HostDevice):
        """Copies only when asked to."""

        def __init__(self) -> None:
            super().__init__()
            self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
            self.arrived: list[int] = []

        def upload(self, target: torch.Tensor, source: torch.Tensor) -> object:
            self.pending.append((target, source))
            return len(self.pending) - 1

        def reclaim(self, ticket: object) -> None:
            assert isinstance(ticket, int)
            for target, source in self.pending[len(self.arrived) : ticket + 1]:
                target.copy_(source)
                self.arrived.append(int(target.view(torch.int32)[0]))

    device = Slow()
    staging = Staging(device, [((4,), torch.int32)])
    for step in range(6):
        staging.pairs[0][0].fill_(step)
        staging.upload()
    device.reclaim(5)
    assert device.arrived == [0, 1, 2, 3, 4, 5]
