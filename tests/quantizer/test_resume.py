"""A quantization stopped at any moment: the same call goes on and writes the same bytes; another call is refused by name."""

from __future__ import annotations

import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from quantizer import export, files, pipeline, run
from quantizer.__main__ import main
from quantizer.config import QuantizeError, QuantizeOptions
from quantizer.run import quantize
from quantizer.work_folder import DONE_FILE, STATE_FILE, WorkFolder, is_begun, work_folder_path

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


@pytest.mark.parametrize(
    ("before", "overwrite", "can_exchange"),
    [
        pytest.param(True, False, True, id="before"),
        pytest.param(True, True, True, id="before-overwrite", marks=pytest.mark.slow),
        pytest.param(False, True, True, id="after-overwrite", marks=pytest.mark.slow),
        pytest.param(True, True, False, id="before-overwrite-in-two-steps", marks=pytest.mark.slow),
        pytest.param(False, True, False, id="after-overwrite-in-two-steps", marks=pytest.mark.slow),
    ],
)
def test_stopped_around_every_rename(
    before: bool,
    overwrite: bool,
    can_exchange: bool,
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
    old, new, missing = _bytes(out), _bytes(tmp_path / "expected"), 0
    stops = 0
    seen: set[str] = set()

    def stopping(rename: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
        def wrapped(first: Path, second: Path) -> Any:
            key = f"{Path(first).name} {Path(second).name}"
            if before and key not in seen:
                seen.add(key)
                raise Stop
            result = rename(first, second)
            if not before and key not in seen:
                seen.add(key)
                raise Stop
            return result

        return wrapped

    monkeypatch.setattr(files.os, "replace", stopping(os.replace))
    monkeypatch.setattr(export, "exchange", stopping(export.exchange) if can_exchange else lambda first, second: False)
    while True:
        try:
            _run(source, out, overwrite=overwrite)
            break
        except Stop:
            stops += 1
            missing += not out.exists()
            assert not out.exists() or _bytes(out) in (old, new)
    assert stops == len(seen) > 12
    assert ("checkpoint out" in seen) and ("replaced out" in seen) == (overwrite and not can_exchange)
    # An exchange leaves OUT in its place at every moment; two renames do not, but the next run puts it back.
    assert missing == 0 if overwrite and can_exchange else missing > 0
    assert _bytes(out) == new
    assert not work_folder_path(out).exists()


def _killed_at_random(source: Path, out: Path, expected: dict[str, bytes], whole: float, kills: int) -> list[int]:
    """Runs in processes of their own until so many were killed, each after a random part of a whole run's seconds.

    Every OUT that gets finished is compared and a new one begun. Returns the finished layers each of the killed left.
    """
    context, generator = multiprocessing.get_context("fork"), random.Random(kills)
    moments = [whole * (index + generator.random()) / kills for index in range(kills)]
    generator.shuffle(moments)
    finished: list[int] = []
    for moment in itertools.islice(itertools.cycle(moments), 10 * kills):
        process = context.Process(target=_run, args=(source, out))
        process.start()
        process.join(moment)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode:
            finished.append(len(list(work_folder_path(out).glob("layer-*.safetensors"))))
        if out.exists() and not is_begun(out):
            assert _bytes(out) == expected
            shutil.rmtree(out)
        if len(finished) == kills:
            break
    return finished


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, out = make_checkpoint("qwen3", num_hidden_layers=6), tmp_path / "out"
    started = time.monotonic()
    _run(source, tmp_path / "expected")
    whole, expected = time.monotonic() - started, _bytes(tmp_path / "expected")
    for slower in (1, 2, 4):  # than the first run, when others want the processor now
        finished = _killed_at_random(source, out, expected, slower * whole, kills)
        assert len(finished) == kills
        if any(finished):
            break
    assert any(finished), "none got as far as a layer"
    _run(source, out)
    assert _bytes(out) == expected and not work_folder_path(out).exists()


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_the_exchange(
    after: bool, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"
    _run(source, out)
    written = _bytes(out)
    (out / "config.json").write_text("{}")
    replaced = _bytes(out)

    def killed(first: Path, second: Path) -> bool:
        assert not after or exchange(first, second)
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    exchange = export.exchange
    with monkeypatch.context() as patch:
        patch.setattr(export, "exchange", killed)
        process = multiprocessing.get_context("fork").Process(
            target=_run, args=(source, out), kwargs={"overwrite": True}
        )
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert _bytes(out) == (written if after else replaced) and work_folder_path(out).exists()
    _run(source, out, overwrite=True)
    assert _bytes(out) == written and not work_folder_path(out).exists()


def test_stopped_while_it_cleans_up(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"
    work = work_folder_path(out)

    def clear_one(self: WorkFolder, kept: Collection[str]) -> None:
        if DONE_FILE in kept:
            (work / "layer-00000.safetensors").unlink()
            raise Stop
        clear(self, kept)

    clear = WorkFolder._clear
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "_clear", clear_one)
        with pytest.raises(Stop):
            _run(source, out)
    written = _bytes(out)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.LayerQuantizer, "quantize_layer", None)  # nothing is done again
        assert len(_run(source, out)["layers"]) == 3
    assert _bytes(out) == written and not work.exists()
    # The last moment: the marks are gone, the folder is not.
    work.mkdir()
    (work / STATE_FILE).write_text("{}")
    with pytest.raises(QuantizeError, match="not empty"):
        _run(source, out)
    _run(source, out, overwrite=True)
    assert _bytes(out) == written and not work.exists()


def test_everything_is_flushed_before_it_appears(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    flushed: set[int] = set()
    appeared: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def recording(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def checking(old: Path, new: Path) -> None:
        if new == out:
            appeared.extend([old, *Path(old).rglob("*")])
            assert [path.name for path in appeared if path.stat().st_ino not in flushed] == []
        replace(old, new)

    monkeypatch.setattr(files.os, "fsync", recording)
    monkeypatch.setattr(files.os, "replace", checking)
    _run(make_checkpoint("llama"), out)
    assert len(appeared) > 6


def test_a_failure_before_the_first_layer_leaves_nothing(
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = make_checkpoint("llama"), tmp_path / "out"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    assert main([str(source), str(out), "--group-size", "32", "--samples", "4", "--sequence-length", "64"]) == 1
    assert "awq-quantize: error: [Errno 28] No space left on device" in capsys.readouterr().err
    assert not out.exists() and not work_folder_path(out).exists()


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
