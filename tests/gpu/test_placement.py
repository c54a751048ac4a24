"""Whole engine steps on a fake CUDA device: no op mixes devices, and nothing but `collect` waits. Each check with its planted
fault."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from kernels.backend import RotaryTable
from kernels.gpu.backend import GpuBackend
from kernels.gpu.launch import Launch
from kernels.gpu.tensors import GpuSampledRows
from kernels.gpu.tuning import CHIPS
from server.config import NgramSpeculation
from server.models.decoder import Decoder
from server.types import GenerateRequest, SamplingParams
from tests.gpu.devices import FakeCudaDevice, cuda_engine
from tests.gpu.launches import NOT_SPECIALIZED, compiled_form, name_of, recorded


def serve(
    checkpoint: Path,
    device: FakeCudaDevice,
    rules: dict[str, Any] | None = None,
    max_uploads: int = 2,
    **options: Any,
) -> None:
    """Prefill in chunks, mixed steps and decodes; one wait per step that samples, and never a value read before it."""
    engine = cuda_engine(checkpoint, max_model_len=200, max_num_batched_tokens=48, **options)
    assert engine.info.backend == "gpu"
    num_accepted = 0
    for index, length in enumerate((3, 100, 40)):
        params = SamplingParams(max_tokens=9, temperature=float(index), top_k=4, min_tokens=2, **(rules or {}))
        engine.submit(GenerateRequest(str(index), list(range(3, 3 + length)), params, time.monotonic()))
    while engine.has_work():
        device.waits = device.uploads = 0
        output = engine.step()
        assert device.waits <= 1 and device.uploads <= max_uploads
        assert not any(event.error for event in output.events)
        num_accepted += sum(output.stats.num_accepted_per_position)
    assert (num_accepted > 6) == ("speculative" in options)


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True}], ids=str)
def test_mixtures_stay_on_their_device_and_compile_nothing_for_a_request(
    mixture_checkpoint: Path, device: FakeCudaDevice, options: dict[str, Any]
) -> None:
    found: list[Launch] = []
    with recorded(found):
        engine = cuda_engine(mixture_checkpoint, max_model_len=500, max_num_batched_tokens=300, **options)
        warm = {compiled_form(start) for start in found}
        tiles = {start.constants["BLOCK_M"] for start in found if start.constants.get("TOP_K") == 2}
        assert tiles == ({64} if options else {16, 32, 64})
        for index, length in enumerate((300, 3, 70, 30, 120, 200)):
            params = SamplingParams(max_tokens=3)
            engine.submit(GenerateRequest(str(index), [3 + i % 300 for i in range(length)], params, time.monotonic()))
        while engine.has_work():
            device.waits = 0
            assert not any(event.error for event in engine.step().events)
            assert device.waits <= 1
    assert not {compiled_form(start) for start in found} - warm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "int8"},
        {"dtype": "bfloat16"},
        {"batch_invariant": True},
        {"speculative": NgramSpeculation(4, 1)},
    ],
    ids=str,
)
def test_engine_steps_stay_on_their_device(checkpoint: Path, device: FakeCudaDevice, options: dict[str, Any]) -> None:
    serve(checkpoint, device, **options)


@pytest.mark.parametrize(
    "rules",
    [
        {"logit_bias": ((5, 1.0), (7, -3.0)), "bad_words": ((7, 7), (9,))},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1, "allowed_token_ids": (7, 8, 9)},
    ],
    ids=("bias", "penalties and mask"),
)
def test_rules_stay_on_the_device(checkpoint: Path, device: FakeCudaDevice, rules: dict[str, Any]) -> None:
    # Each of three requests brings its history and factors once, and its mask at every step.
    serve(checkpoint, device, rules, max_uploads=2 + 3 * 3)
    # And with drafts a mask per row, of which there are up to five.
    serve(checkpoint, device, rules, max_uploads=2 + 3 * (2 + 5), speculative=NgramSpeculation(4, 1))


def test_a_planted_device_mix_is_caught(
    checkpoint: Path, device: FakeCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GpuBackend, "prepare_rotary", lambda self, cos, sin: RotaryTable(cos, sin))
    with pytest.raises(RuntimeError, match="rope_and_store: tensors on several devices: cpu, cuda:0"):
        serve(checkpoint, device)


def test_a_planted_mix_in_a_library_op_is_caught(
    checkpoint: Path, device: FakeCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *args: original(*args) + torch.zeros(320))
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        serve(checkpoint, device)


def test_a_planted_item_is_caught(checkpoint: Path, device: FakeCudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Decoder.forward

    def planted(self: Decoder, *args: Any) -> Tensor:
        logits = original(self, *args)
        return logits * logits[0, 0].item()

    monkeypatch.setattr(Decoder, "forward", planted)
    with pytest.raises(DataDependentOutputException):
        serve(checkpoint, device)


def test_a_planted_second_wait_is_caught(
    checkpoint: Path, device: FakeCudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GpuBackend.sample

    def planted(self: GpuBackend, *args: Any) -> GpuSampledRows:
        rows = original(self, *args)
        rows.to_host()
        return dataclasses.replace(rows)

    monkeypatch.setattr(GpuBackend, "sample", planted)
    with pytest.raises(AssertionError):
        serve(checkpoint, device)


@pytest.mark.parametrize(
    ("chip", "options"),
    [
        ("A100-80GB", {}),
        pytest.param("H100-SXM", {}, marks=pytest.mark.slow),
        pytest.param("T4", {}, marks=pytest.mark.slow),
        ("H100-SXM", {"batch_invariant": True}),
        ("A100-80GB", {"speculative": NgramSpeculation(6, 1)}),
    ],
    ids=str,
)
def test_requests_compile_nothing_and_need_no_more_workspace(
    wide_checkpoint: Path, device: FakeCudaDevice, chip: str, options: dict[str, Any]
) -> None:
    """Prompts of every regime of the products, batches of every size, rules: all was met before the engine is ready. That
    workspaces hold what is asked of them, they assert."""
    device.chip = CHIPS[chip]
    found: list[Launch] = []
    with recorded(found):
        engine = cuda_engine(
            wide_checkpoint,
            max_model_len=6000,
            max_num_seqs=21,
            max_num_batched_tokens=1100,
            enable_prefix_caching=False,
            **options,
        )
        warm = {compiled_form(start) for start in found}
        assert len({start.constants["NUM_PARTS"] for start in found if name_of(start) == "awq_gemm_kernel"}) > 1
        rules: list[dict[str, Any]] = [
            {"logit_bias": ((5, 1.0), (7, -3.0), (9, 1.0))},
            {"frequency_penalty": 0.5, "min_tokens": 2},
            {"repetition_penalty": 1.5, "allowed_token_ids": (7, 8, 9)},
            {"allowed_token_ids": (7, 8, 9), "temperature": 1.0},
        ]
        lengths = (7, 20, 40, 90, 140, 200, 270, 330, 400, 480, 600, 800, 1099, 1, 2, 3, 5, 5, 5, 5, 5, 5, 2500)
        for index, length in enumerate(lengths):
            params = SamplingParams(
                max_tokens=2 + index, **{"temperature": 0.0, "ignore_eos": True, **rules[index % 4]}
            )
            tokens = [3 + token % 300 for token in range(length)]
            engine.submit(GenerateRequest(str(index), tokens, params, time.monotonic()))
            for _ in range(2):
                assert not any(event.error for event in engine.step().events)
        while engine.has_work():
            assert not any(event.error for event in engine.step().events)
    new = {compiled_form(start) for start in found} - warm
    assert not new, sorted(map(str, new))


def test_marks_of_arguments() -> None:
    from kernels.gpu import attention, awq_kernels, fused, sampling

    marked = set()
    for module in (attention, awq_kernels, fused, sampling):
        for match in re.findall(r"do_not_specialize=\[([^]]*)\]", inspect.getsource(module)):
            marked |= set(re.findall(r"\w+", match))
    assert marked == NOT_SPECIALIZED
