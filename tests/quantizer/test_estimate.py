"""Estimates grow with what they are estimates of, and what does not fit is refused with what would."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from quantizer import estimate, run
from quantizer.config import QuantizeError, QuantizeOptions
from quantizer.mappings import find_architecture
from quantizer.sources import SafetensorsSource
from quantizer.work_folder import work_folder_path


def _estimate(source: Path, **options: object) -> estimate.Estimate:
    job = run.prepare(SafetensorsSource(source), QuantizeOptions(group_size=32, sequence_length=64, **options))
    return estimate.estimate(job.architecture, job.options, job.shapes, job.source.config, job.tokens.shape[0], 1e9)


def test_more_work_is_estimated_as_more(make_checkpoint: Callable[..., Path]) -> None:
    small = make_checkpoint("llama")
    wide = make_checkpoint("llama", name="wide", hidden_size=256, intermediate_size=512)
    deep = make_checkpoint("llama", name="deep", num_hidden_layers=6)
    base = _estimate(small, samples=8)
    assert _estimate(small, samples=16).memory_bytes - base.memory_bytes == 8 * base.bytes_per_sample
    assert _estimate(small, samples=16).seconds > 1.3 * base.seconds
    assert _estimate(wide, samples=8).fixed_bytes > base.fixed_bytes
    assert _estimate(deep, samples=8).seconds == pytest.approx(2 * base.seconds)
    assert _estimate(deep, samples=8).fixed_bytes == base.fixed_bytes
    assert _estimate(small, samples=8, effort="fast").seconds < base.seconds
    assert _estimate(small, samples=8, method="rtn").seconds < base.seconds


def test_seven_billion_parameters_fit_eight_gigabytes() -> None:
    hidden, intermediate, key_value = 3584, 18944, 512
    config = transformers.Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        architectures=["Qwen2ForCausalLM"],
    )
    linears = {"q": (hidden, hidden), "k": (key_value, hidden), "v": (key_value, hidden), "o": (hidden, hidden)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in linears.items()}
    shapes |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, intermediate)
    layers = {f"model.layers.{index}.{name}.weight": shape for index in range(28) for name, shape in shapes.items()}
    options = QuantizeOptions().resolved()
    assert options.samples is not None
    needed = estimate.estimate(
        find_architecture(config),
        options,
        {"model.embed_tokens.weight": (152064, hidden), "lm_head.weight": (152064, hidden), **layers},
        config,
        options.samples,
        1e11,
    )
    assert 5e9 < needed.memory_bytes < 8e9


def test_disk_is_enough_for_what_is_written(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = make_checkpoint("llama", hidden_size=128, intermediate_size=256)
    needed = _estimate(source, samples=4)
    options = QuantizeOptions(group_size=32, samples=4, sequence_length=64)
    report = run.quantize(str(source), tmp_path / "out", options, progress=False)
    assert report["bytes"] < needed.disk_bytes < 4 * report["bytes"]
    assert report["estimate"]["memory_bytes"] > 0 and report["peak_memory_bytes"] > 0


def test_refusals_say_what_would_fit(tmp_path: Path) -> None:
    needed = estimate.Estimate(2_000_000_000, 100_000_000, 30, 1_000_000_000, 60.0)
    estimate.check_fits(needed, needed.memory_bytes, needed.disk_bytes, tmp_path)
    with pytest.raises(QuantizeError, match=re.escape("5.0 GB of memory, 2.5 GB are available")) as refused:
        estimate.check_fits(needed, 2_550_000_000, needed.disk_bytes, tmp_path)
    samples = int(str(refused.value).rpartition("--samples ")[2].split()[0])
    estimate.check_fits(
        estimate.Estimate(2_000_000_000, 100_000_000, samples, 1, 1.0), 2_550_000_000, needed.disk_bytes, tmp_path
    )
    with pytest.raises(QuantizeError, match=re.escape("no number of samples would fit: one layer alone takes 2.0 GB")):
        estimate.check_fits(needed, 1_900_000_000, needed.disk_bytes, tmp_path)
    with pytest.raises(QuantizeError, match=re.escape("1.0 GB of disk, 0.5 GB are free")):
        estimate.check_fits(needed, needed.memory_bytes, 500_000_000, tmp_path)


def test_parts_that_are_there_already_are_no_lack_of_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (work_folder_path(out) / "checkpoint").mkdir(parents=True)
    for name in ("layer-00000.safetensors", "checkpoint/model.safetensors"):
        (work_folder_path(out) / name).write_bytes(bytes(1000))
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10_000, 9_000, 1_000))
    assert estimate.free_disk_bytes(out) == 3_000


def test_nothing_is_begun_that_does_not_fit(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"
    options = QuantizeOptions(group_size=32, samples=2, sequence_length=64)
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    with pytest.raises(QuantizeError, match="of memory"):
        run.quantize(str(source), out, options, progress=False)
    assert not out.exists() and not work_folder_path(out).exists()
    run.quantize(str(source), out, options, progress=False, memory_check=False)
    assert out.is_dir()
