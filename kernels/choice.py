"""Which back end runs: the one named, or the fastest that works on this machine, with the reason in the log."""

from __future__ import annotations

import logging

import torch

from kernels.backend import Backend, BackendOptions

logger = logging.getLogger(__name__)

BACKEND_NAMES = ("auto", "reference", "cpu", "gpu")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float16", "bfloat16")
CPU_ACTIVATIONS = ("int8", "int16")
LM_HEAD_DTYPES = ("auto", "int8", "int4", "fp16")


def create_backend(name: str, options: BackendOptions) -> Backend:
    """The back end called `name` (one of BACKEND_NAMES); "auto" takes the fastest that works here and logs why.

    Raises ValueError for an unknown name or a back end that cannot run here.
    """
    if name not in BACKEND_NAMES:
        raise ValueError(f"kernel backend {name!r}: expected one of {', '.join(BACKEND_NAMES)}")
    for option, value, allowed in (
        ("device", options.device, DEVICES),
        ("dtype", options.dtype, DTYPES),
        ("cpu_activations", options.cpu_activations, CPU_ACTIVATIONS),
        ("lm_head_dtype", options.lm_head_dtype, LM_HEAD_DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"{option} {value!r}: expected one of {', '.join(allowed)}")
    if options.device == "cuda" and name not in ("auto", "gpu"):
        raise ValueError(f"kernel backend {name!r} does not run on device 'cuda'")
    if options.device == "cpu" and name == "gpu":
        raise ValueError("kernel backend 'gpu' does not run on device 'cpu'")
    if name in ("auto", "gpu") and options.device != "cpu":
        backend, reason = _create_gpu(options)
        if backend is not None:
            return backend
        if name == "gpu" or options.device == "cuda":
            raise ValueError(f"kernel backend 'gpu': {reason}")
        # A GPU that is there and not used is worth a warning; that most machines have none is not.
        logger.log(logging.WARNING if torch.cuda.is_available() else logging.INFO, "no GPU kernels: %s", reason)
    if options.dtype != "auto":
        raise ValueError(f"dtype {options.dtype!r}: only GPU back ends have a choice of it")
    if name in ("auto", "cpu"):
        backend, reason = _create_cpu(options)
        if backend is not None:
            return backend
        if name == "cpu":
            raise ValueError(f"kernel backend 'cpu': {reason}")
        logger.warning(
            "native CPU kernels are missing (%s): every step runs in plain PyTorch, about 10 times slower", reason
        )
        name = "reference"
    if name == "reference":
        from kernels.reference import ReferenceBackend

        return ReferenceBackend(options)
    raise AssertionError(name)


def _create_gpu(options: BackendOptions) -> tuple[Backend | None, str]:
    """The Triton back end, or None and why not. Triton takes half a second to import: only where there is a GPU to use it on."""
    from kernels.gpu.device import open_device

    try:
        device = open_device()
        from kernels.gpu.backend import GpuBackend

        return GpuBackend(options, device), ""
    except ValueError as error:
        return None, str(error)
    except ImportError as error:
        return None, f"{error}; pip install triton"


def _create_cpu(options: BackendOptions) -> tuple[Backend | None, str]:
    """The native back end, or None and why not: it was not built, or not for this machine."""
    try:
        from kernels.cpu.backend import CpuBackend
    except ImportError as error:
        return None, f"{error}; install with a C++ compiler to build them"
    return CpuBackend(options), ""
