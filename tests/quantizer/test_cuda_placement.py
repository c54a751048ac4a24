"""Quantized on a CUDA device by the same code, without one: on a pretended device whose arithmetic is the CPU's the checkpoint is
the CPU's byte for byte, and between loading a layer and its result nothing is computed on the host."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantizer import calibrate, estimate, run
from quantizer.__main__ import main
from quantizer.calibrate import LayerRunner
from quantizer.config import EFFORTS, QuantizeError, QuantizeOptions
from quantizer.device import find_device
from quantizer.pipeline import LayerQuantizer
from quantizer.refinement import refine
from quantizer.rounding import round_feedback
from quantizer.run import quantize
from quantizer.search import RangeChooser
from quantizer.work_folder import work_folder_path
from tests.quantizer.pretended_device import DEVICE, NAME, PretendedDevice, PretendedTensor, pretended_device
from tests.tiny_models import TINY_MODELS

OPTIONS = QuantizeOptions(
    group_size=32, samples=3, sequence_length=64, calibration=str(Path(calibrate.__file__).with_name("prose.txt"))
)
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "high": {"effort": "high"},
    "rtn": {"method": "rtn", "format": "compressed-tensors"},
    "nearest": {"rounding": "nearest", "format": "compressed-tensors"},
    "whole-rows": {"group_size": -1, "effort": "fast"},
}
ONE_LAYER = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LAYERS: dict[str, dict[str, Any]] = {
    "llama-untied-biased": {"head_dim": 32},
    "gemma2": {"layer_types": ["sliding_attention"]},
    "gemma3_text": {"layer_types": ["full_attention"]},
    "smollm3": {"no_rope_layers": [1]},
    "mixtral": {"num_local_experts": 2},
    "qwen3_moe": {"mlp_only_layers": []},
}
"""What a kind's config needs besides, for one layer."""
QUICK = {
    ("llama", "high"),
    ("llama", "rtn"),
    ("qwen2", "nearest"),
    ("qwen3", "whole-rows"),
    *((kind, "default") for kind in ("llama-untied-biased", "gemma3_text", "phi3", "mixtral")),
}
ON_HOST = {
    "quantize_layer": {"aten.split.Tensor", "aten.lift_fresh.default"},
    "run": {"aten.split.Tensor", "aten.empty_like.default"},
}
"""Hidden states are cut into chunks on their way to the device, a checkpoint's `weight_shape` is made, and room for the hidden
states that come back."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    monkeypatch.setattr(estimate, "measured_rate", lambda device: 1e9)
    with pretended_device(monkeypatch) as pretended:
        yield pretended


def _quantize(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return quantize(str(source), out, QuantizeOptions(**{**OPTIONS.to_dict(), **options}), progress=False)


def _written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "report" not in path.name}


def _watched(monkeypatch: pytest.MonkeyPatch, device: PretendedDevice, owner: type, name: str) -> Counter[str]:
    """Operations on the host within a method, by name."""
    original, seen = getattr(owner, name), Counter[str]()

    def watched(*arguments: Any) -> Any:
        before = device.on_host.copy()
        result = original(*arguments)
        seen.update(device.on_host - before)
        return result

    monkeypatch.setattr(owner, name, watched)
    return seen


def _check(
    source: Path, tmp_path: Path, device: PretendedDevice, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    on_cpu = _quantize(source, tmp_path / "cpu", device="cpu", **options)
    assert device.launches == 0 and on_cpu["versions"]["device"] == "cpu"
    quantizing = _watched(monkeypatch, device, LayerQuantizer, "quantize_layer")
    running = _watched(monkeypatch, device, LayerRunner, "run")
    report = _quantize(source, tmp_path / "cuda", **options)
    assert report["versions"]["device"] == f"cuda {NAME}" and device.launches > 1000
    assert _written(tmp_path / "cuda") == _written(tmp_path / "cpu")
    for layer, other in zip(report["layers"], on_cpu["layers"], strict=True):
        assert {**layer, "seconds": 0} == {**other, "seconds": 0}
    assert quantizing.keys() <= ON_HOST["quantize_layer"] and running.keys() <= ON_HOST["run"]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=() if (kind, method) in QUICK else pytest.mark.slow)
        for kind in TINY_MODELS
        for method in METHODS
    ],
)
def test_a_layer_is_quantized_as_on_the_cpu(
    kind: str,
    method: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    device: PretendedDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_checkpoint(kind, torch.bfloat16, **ONE_LAYER, **LAYERS.get(kind, {}))
    _check(source, tmp_path, device, monkeypatch, **METHODS[method])


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "llama" else pytest.mark.slow) for k in TINY_MODELS])
def test_layers_in_turn_are_quantized_as_on_the_cpu(
    kind: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    device: PretendedDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _check(make_checkpoint(kind), tmp_path, device, monkeypatch, effort="fast")


def test_what_is_left_on_the_host_is_found(
    make_checkpoint: Callable[..., Path], tmp_path: Path, device: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", **ONE_LAYER)
    clipped = LayerQuantizer._clipped_rows
    monkeypatch.setattr(LayerQuantizer, "_clipped_rows", lambda *arguments: clipped(*arguments).cpu())
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        _quantize(source, tmp_path / "out", effort="fast")


def test_loops_over_columns_read_no_values(device: PretendedDevice) -> None:
    """Each would be waited for: the factorization's success is read once, and per block of a sweep whether anything moved."""
    generator = torch.Generator().manual_seed(0)
    for columns in (64, 128):
        weight, inputs = (torch.randn(rows, columns, generator=generator).to(DEVICE) for rows in (16, 256))
        moment = inputs.t() @ inputs / 256
        choose = RangeChooser(torch.ones(16, dtype=torch.bool, device=DEVICE))
        before = device.reads
        rounded = round_feedback(weight, moment, 64, choose)
        assert device.reads == before + 1
        refine(weight, moment, rounded, sweeps=1)
        assert device.reads == before + 1 + columns // 64


def test_what_experts_read_waits_on_the_host(device: PretendedDevice) -> None:
    kept: list[torch.Tensor] = []
    collector = calibrate._Collector(kept=kept)
    collector.add(torch.ones(4, 8, device=DEVICE))
    assert [rows.device.type for rows in kept] == ["cpu"] and collector.result().second_moment.device == DEVICE


def test_the_pretended_device_refuses_what_a_gpu_would(device: PretendedDevice) -> None:
    ours, plain = torch.arange(6.0, device=DEVICE).reshape(2, 3), torch.ones(2, 3)
    assert isinstance(ours, PretendedTensor) and ours.device == DEVICE
    for mixed in (
        lambda: ours + plain,
        lambda: plain + ours.sum(),
        lambda: ours @ plain.t(),
        lambda: torch.cat([ours, plain]),
        lambda: torch.where(plain > 0, ours, ours),
        lambda: plain.add_(ours),
        lambda: plain[ours[0].long()],
        lambda: ours.addmm_(torch.tensor(1.0), plain),
    ):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mixed()
    with pytest.raises(RuntimeError):
        ours.numpy()
    # Scalars of the host, indices of the host and copies across are let through, there as here.
    assert torch.equal((ours + torch.tensor(1.0)).cpu(), torch.arange(1.0, 7.0).reshape(2, 3))
    assert torch.equal(ours[torch.tensor([1])].cpu(), torch.tensor([[3.0, 4.0, 5.0]]))
    view = ours[1]
    view.copy_(plain[1])
    view[0] = 7.0
    assert torch.equal(plain.copy_(ours), torch.tensor([[0.0, 1.0, 2.0], [7.0, 1.0, 1.0]]))


def test_a_device_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(QuantizeError, match=r"device: 'cuda' is not there; .* finds cpu$"):
        find_device("cuda")
    with pretended_device(monkeypatch):
        assert find_device("auto") == find_device("cuda") == find_device("cuda:0") == DEVICE
        assert find_device("cpu") == torch.device("cpu")
        with pytest.raises(QuantizeError, match=rf"device: 'cuda:1' is not there; .* finds cpu, cuda:0 \({NAME}\)$"):
            find_device("cuda:1")
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "meta"):
        with pytest.raises(QuantizeError, match=f"device: '{name}' is not one of auto, cpu, cuda, cuda:N"):
            QuantizeOptions(device=name)


def test_what_a_cpu_began_no_gpu_goes_on_with(
    make_checkpoint: Callable[..., Path], tmp_path: Path, device: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint("llama", num_hidden_layers=2), tmp_path / "out"
    original = LayerQuantizer.quantize_layer

    def failing(self: LayerQuantizer, index: int, *arguments: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return original(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LayerQuantizer, "quantize_layer", failing)
        with pytest.raises(KeyboardInterrupt):
            _quantize(source, out, method="rtn", device="cpu")
    with pytest.raises(QuantizeError, match=r"begun with options\.device 'cpu', now 'cuda' \(versions\.device too\)"):
        _quantize(source, out, method="rtn")
    assert len(_quantize(source, out, method="rtn", device="cpu")["layers"]) == 2
    # Another device of the same kind may.
    fingerprints = [
        run.prepare(run.sources.open_source(str(source)), replace(OPTIONS, device=name)).fingerprint()
        for name in ("auto", "cuda", "cuda:0")
    ]
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]


def test_neither_memory_may_be_too_small(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint("llama", **ONE_LAYER)
    with pretended_device(monkeypatch, free_bytes=1_000_000):
        with pytest.raises(QuantizeError, match=r"of the GPU's memory, 0\.0 GB are free; --device cpu") as refused:
            _quantize(source, tmp_path / "out")
        assert "host" in str(refused.value) and not work_folder_path(tmp_path / "out").exists()
        rate, launch = (measure(DEVICE) for measure in (estimate.measured_rate, estimate.measured_launch))
        assert rate > 0 and 0 < launch < 1
        _quantize(source, tmp_path / "out", method="rtn", device="cpu")
    with pretended_device(monkeypatch):
        monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
        with pytest.raises(QuantizeError, match=r"of memory, 0\.0 GB are available"):
            _quantize(source, tmp_path / "other")


def test_beside_a_gpu_the_host_needs_less(make_checkpoint: Callable[..., Path]) -> None:
    source = run.sources.open_source(str(make_checkpoint("llama")))

    def needed(on_host: bool, launch_seconds: float = 0.0, **options: Any) -> estimate.Estimate:
        job = run.prepare(source, QuantizeOptions(**{**OPTIONS.to_dict(), "device": "cpu", **options}))
        return estimate.estimate(
            job.architecture,
            job.options,
            job.shapes,
            source.config,
            job.tokens.shape[0],
            1e9,
            launch_seconds,
            on_host,
        )

    cpu, gpu, more_text = needed(True), needed(False), needed(False, samples=6)
    assert cpu.device_bytes == 0 and cpu.fixed_bytes == estimate.PROCESS_BYTES + gpu.device_bytes
    assert estimate.PROCESS_BYTES < gpu.fixed_bytes < cpu.fixed_bytes
    assert more_text.device_bytes == gpu.device_bytes and more_text.memory_bytes > gpu.memory_bytes
    assert "of the GPU's" in estimate.describe(gpu) and "of the GPU's" not in estimate.describe(cpu)
    columns = 3 * (64 * 3 + 96)
    for effort, passes in (("default", 1), ("high", 1 + EFFORTS["high"].sweeps)):
        slower, faster = (needed(False, seconds, effort=effort).seconds for seconds in (1.0, 0.0))
        assert slower - faster == pytest.approx(columns * passes * estimate.COLUMN_OPERATIONS)
    assert needed(False, 1.0, rounding="nearest").seconds == needed(False, rounding="nearest").seconds


def test_matmuls_are_in_full_precision(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = LayerQuantizer.quantize_layer

    def recording(*arguments: Any) -> Any:
        seen.append(torch.get_float32_matmul_precision())
        return original(*arguments)

    monkeypatch.setattr(LayerQuantizer, "quantize_layer", recording)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _quantize(make_checkpoint("llama", **ONE_LAYER), tmp_path / "out", method="rtn", device="cpu")
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_evaluated_as_on_the_cpu(
    make_checkpoint: Callable[..., Path], tmp_path: Path, device: PretendedDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_checkpoint("gemma3_text"), tmp_path / "out"
    _quantize(source, out, method="rtn", device="cpu")
    arguments = ["evaluate", str(out), "--reference", str(source), "--sequence-length", "64", "--max-tokens", "128"]
    results = []
    for name in ("cpu", "cuda"):
        assert main([*arguments, "--device", name]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        assert (device.launches > 0) == (name == "cuda")
    assert results[0] == results[1]
    assert main([*arguments, "--device", "cuda:5"]) == 1
    assert "error: device: 'cuda:5' is not there" in capsys.readouterr().err
