"""The compile check speaks of every kernel that the product launches: what the engine's launches have of modes, its cases have
too."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import AttentionShape, BackendOptions, KVCacheSpec
from kernels.gpu.backend import GpuBackend
from kernels.gpu.cases import all_cases
from kernels.gpu.launch import Launch
from server.types import GenerateRequest, SamplingParams
from tests.awq_checkpoints import make_awq_checkpoint
from tests.gpu.devices import FakeCudaDevice, cuda_engine
from tests.gpu.launches import name_of, recorded
from tests.tiny_models import TINY_MODELS, make_tiny_model

Modes = set[tuple[Any, ...]]


def modes(start: Launch) -> Iterator[tuple[Any, ...]]:
    """What chooses a path through a kernel, in small groups: a kernel with many switches is compiled with each of a group's
    combinations, not with those of all groups together."""
    name, constants = name_of(start), start.constants
    given = dict(zip(start.kernel.arg_names, start.args, strict=False))
    kinds = {key: value.dtype if isinstance(value, Tensor) else None for key, value in given.items()}
    if name == "awq_gemm_kernel":
        x, group = kinds["x_ptr"], group_class(constants["GROUP"])
        is_in_turn = constants["NUM_PARTS"] > 1 and not constants["SPLIT"]
        is_split = constants["NUM_PARTS"] > 1 and constants["SPLIT"]
        loop = (group, constants["BLOCK_M"], constants["SCALE_AFTER"], is_in_turn)
        yield (name, "loop", x, *loop)
        yield (name, "ragged", constants["EVEN_K"], *loop)
        yield (name, "scales", x, group, constants["SCALE_BF16"])
        if kinds["rows_ptr"] is None:
            yield (name, "end", kinds["bias_ptr"], kinds["out_ptr"] == torch.float32, is_split)
        else:
            yield (name, "experts", x, kinds["bias_ptr"], constants["BLOCK_M"], constants["TOP_K"] > 1)
    elif name in ("decode_kernel", "prefill_kernel"):
        is_segmented = name == "prefill_kernel" and constants["SEGMENT"] > 0
        yield (name, kinds["q_ptr"], kinds["key_ptr"], is_segmented)
        yield (name, kinds["key_ptr"] == torch.int8, is_segmented, constants["WINDOW"], constants["SOFT_CAP"])
    elif name == "dequantize_kernel":
        yield (name, kinds["out_ptr"], group_class(constants["GROUP"]), constants["SCALE_BF16"])
    elif name == "dense_kernel":
        yield (name, kinds["x_ptr"], kinds["out_ptr"])
        yield (name, kinds["bias_ptr"], kinds["out_ptr"] == torch.float32)
    else:
        names = ("GELU", "UNIT_OFFSET", "NORM_ALL_HEADS", "WINDOW", "RENORMALIZE", "SHARED")
        switches = {key: constants[key] for key in names if key in constants}
        if name == "rope_and_store_kernel" and given["q_norm_ptr"] is None:
            switches = {}  # of the norm
        yield (name, *kinds.items(), *switches.items())


def group_class(group_size: int) -> int:
    return next((size for size in (128, 64, 32) if group_size and group_size % size == 0), 0)


def compiled_modes(arch: str) -> Modes:
    return {mode for case in all_cases(arch) for mode in modes(case.launch)}


def launched_modes(checkpoint: Path, device: FakeCudaDevice, **options: Any) -> Modes:
    """Of an engine that serves a few requests, its warm-up included."""
    found: list[Launch] = []
    with recorded(found):
        engine = cuda_engine(checkpoint, max_model_len=400, max_num_batched_tokens=700, **options)
        for index, rules in enumerate(({"logit_bias": ((5, 1.0),)}, {"repetition_penalty": 1.2}, {"temperature": 1.0})):
            params = SamplingParams(max_tokens=3, **rules)  # type: ignore[arg-type]
            engine.submit(GenerateRequest(str(index), list(range(3, 103)), params, time.monotonic()))
        while engine.has_work():
            engine.step()
    return {mode for start in found for mode in modes(start)}


def assert_known(launched: Modes, compiled: Modes) -> None:
    unknown = launched - compiled
    assert not unknown, "\n".join(sorted(map(str, unknown)))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"dtype": "bfloat16"},
    {"kv_cache_dtype": "int8"},
    {"batch_invariant": True, "dtype": "bfloat16", "kv_cache_dtype": "int8"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("is_wide", [False, True])
def test_every_launch_of_the_engine_is_a_case(
    is_wide: bool, options: dict[str, Any], checkpoint: Path, wide_checkpoint: Path, device: FakeCudaDevice
) -> None:
    launched = launched_modes(wide_checkpoint if is_wide else checkpoint, device, **options)
    assert_known(launched, compiled_modes("sm_90"))


@pytest.mark.parametrize("options", [{}, {"batch_invariant": True, "dtype": "bfloat16"}], ids=str)
def test_every_launch_of_a_mixture_is_a_case(
    options: dict[str, Any], mixture_checkpoint: Path, device: FakeCudaDevice
) -> None:
    launched = launched_modes(mixture_checkpoint, device, **options)
    assert {"route_kernel", "combine_kernel"} <= {mode[0] for mode in launched}
    assert_known(launched, compiled_modes("sm_90"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_every_launch_of_every_architecture_is_a_case(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make_tiny_model(tmp_path / "source", kind)
    make_awq_checkpoint(tmp_path / "source", tmp_path / "awq", tmp_path / "dense", 32)
    device: FakeCudaDevice = request.getfixturevalue("device")  # from here on tensors are fake
    for options in OPTIONS:
        assert_known(launched_modes(tmp_path / "awq", device, **options), compiled_modes("sm_90"))


def test_a_launch_that_is_no_case_is_seen(checkpoint: Path, device: FakeCudaDevice) -> None:
    launched = launched_modes(checkpoint, device)
    for name in ("gather_rows_kernel", "awq_gemm_kernel", "decode_kernel", "add_rms_norm_kernel"):
        without = {mode for mode in compiled_modes("sm_90") if mode[0] != name}
        with pytest.raises(AssertionError, match=name):
            assert_known(launched, without)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_windows_and_soft_caps_are_cases(device: FakeCudaDevice, int8: bool, batch_invariant: bool) -> None:
    backend = GpuBackend(
        BackendOptions(kv_cache_dtype="int8" if int8 else "auto", batch_invariant=batch_invariant), device
    )
    batch, _ = backend.allocate_batches(64, 4, 8, 4)
    shape = AttentionShape(4, 2, 64)
    (kv,) = backend.allocate_kv(KVCacheSpec(1, 9, 16, 2, 64))
    batch.host_query_lens, batch.num_tokens, batch.num_sequences = [1, 20], 21, 2
    found: list[Launch] = []
    with recorded(found):
        for window in (None, 40):
            for soft_cap in (None, 30.0):
                q = torch.empty(21, 4, 64, dtype=torch.float16, device=backend.device)
                backend.attention(q, shape, kv, batch, 0.1, window, soft_cap)
    launched = {mode for start in found for mode in modes(start)}
    assert len(found) == 12
    assert_known(launched, compiled_modes("sm_90"))
