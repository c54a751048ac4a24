"""A quantization stopped at any moment: the same call goes on and writes the same bytes; another call is refused by name."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantizer import export, files, pipeline, run
from quantizer.__main__ import main
from quantizer.config import QuantizeError, QuantizeOptions
from quantizer.run import quantize
from quantizer.work_folder import work_folder_path

OPTIONS = QuantizeOptions(group_size=32, samples=4, sequence_length=64, max_shard_bytes=120_000)


def _run(source: Path, out: Path, **arguments: Any) -> dict[str, Any]:
    return quantize(str(source), out, OPTIONS, progress=False, **arguments)


def _bytes(folder: Path) -> dict[str, bytes]:
    """Everything but the report, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (export.REPORT_FILE, export.HTML_FILE)
    }


class Stop(BaseException):
    """Ends a run as a kill would: nothing catches it."""


@pytest.mark.parametrize(("before", "overwrite"), [(True, False), (False, True)], ids=["before", "after-overwrite"])
def test_stopped_around_every_rename(
    before: bool,
    overwrite: bool,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each run gets one rename further than the one before it, so all of them are stopped at once."""
    source, out = make_checkpoint("llama"), tmp_path / "out"
    _run(source, tmp_path / "expected")
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text("{}")
    replace, stops = os.replace, 0
    seen: set[str] = set()

    def stopping(old: Path, new: Path) -> None:
        key = f"{Path(old).name} {Path(new).name}"
        if before and key not in seen:
            seen.add(key)
            raise Stop
        replace(old, new)
        if not before and key not in seen:
            seen.add(key)
            raise Stop

    monkeypatch.setattr(files.os, "replace", stopping)
    while True:
        try:
            _run(source, out, overwrite=overwrite)
            break
        except Stop:
            stops += 1
    assert stops == len(seen) > 12
    assert _bytes(out) == _bytes(tmp_path / "expected")
    assert not work_folder_path(out).exists()


def _killed_at_random(source: Path, out: Path, kills: int, seed: int) -> int:
    """Runs in processes of their own, killed after a random part of a whole run's time; returns how many died so."""
    context, died = multiprocessing.get_context("fork"), 0
    started = time.monotonic()
    _run(source, out.with_name("expected"))
    whole, generator = time.monotonic() - started, random.Random(seed)
    for _ in range(kills):
        process = context.Process(target=_run, args=(source, out))
        process.start()
        process.join(generator.uniform(0, 0.8) * whole)
        process.kill()
        process.join()
        died += process.exitcode == -signal.SIGKILL
        if out.exists() and not work_folder_path(out).exists():
            break
    return died


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_checkpoint("qwen3", num_hidden_layers=4 + kills), tmp_path / "out"
    assert _killed_at_random(source, out, kills, seed=kills) >= 1
    if not out.exists() or work_folder_path(out).exists():
        _run(source, out)
    assert _bytes(out) == _bytes(tmp_path / "expected")


@pytest.fixture
def stopped(make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source, and an OUT whose quantization was interrupted in its last layer."""
    source, out = make_checkpoint("llama"), tmp_path / "out"
    original = pipeline.LayerQuantizer.quantize_layer

    def failing(self: pipeline.LayerQuantizer, index: int, *arguments: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return original(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.LayerQuantizer, "quantize_layer", failing)
        with pytest.raises(KeyboardInterrupt):
            _run(source, out)
    assert not out.exists()
    return source, out


def test_finished_layers_are_not_done_again(stopped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = stopped
    done = []
    original = pipeline.LayerQuantizer.quantize_layer

    def counting(self: pipeline.LayerQuantizer, index: int, *arguments: Any) -> Any:
        done.append(index)
        return original(self, index, *arguments)

    monkeypatch.setattr(pipeline.LayerQuantizer, "quantize_layer", counting)
    report = _run(source, out)
    assert done == [2] and [layer["layer"] for layer in report["layers"]] == [0, 1, 2]


def test_another_command_is_refused_by_name(
    stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = stopped
    arguments = [str(source), str(out), "--group-size", "32", "--sequence-length", "64", "--max-shard-size", "1.2e-4"]
    assert main([*arguments, "--samples", "5"]) == 1
    message = capsys.readouterr().err
    assert (
        "begun with calibration.sha256" in message and "options.samples" in message and "2 finished layers" in message
    )
    versions = {**run.versions(), "threads": 7}
    with monkeypatch.context() as patch:
        patch.setattr(run, "versions", lambda: versions)
        with pytest.raises(QuantizeError, match=r"begun with versions\.threads \d, now 7; "):
            _run(source, out)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(QuantizeError, match=r"begun with source\.sha256"):
        _run(source, out)
    _run(source, out, restart=True)
    assert (out / "config.json").is_file() and not work_folder_path(out).exists()


def test_two_at_once_are_refused(stopped: tuple[Path, Path]) -> None:
    source, out = stopped
    with (work_folder_path(out) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(QuantizeError, match="another awq-quantize is at work"):
            _run(source, out)
    _run(source, out)
