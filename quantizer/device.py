"""The device a quantization computes on: its choice, and all that is asked of CUDA itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from quantizer.config import QuantizeError, check_device_name

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """What `--device` means: `auto` is the first CUDA device, or else the CPU. QuantizeError says what there is instead."""
    check_device_name(name)
    num_devices = torch.cuda.device_count() if name != "cpu" and torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not num_devices):
        return CPU
    index = int(name.partition(":")[2] or 0)
    if index >= num_devices:
        found = ", ".join(["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(num_devices))])
        raise QuantizeError(f"device: {name!r} is not there; torch {torch.__version__} finds {found}")
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """What kind of device it is, and of CUDA's the model: other kinds sum in another order."""
    return "cpu" if device.type == "cpu" else f"{device.type} {torch.cuda.get_device_name(device)}"


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given: a GPU is given work ahead of time."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes of a GPU's memory that may be taken: free, or kept by torch for tensors that are gone. None of the CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors have taken of a GPU's memory at most; 0 of the CPU."""
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within, fp32 matmuls are fp32: not TF32 on CUDA, whose 10 bits of mantissa would be all that second moments are known to,
    and which NVIDIA's images switch on by an environment variable; not bf16 on the CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
