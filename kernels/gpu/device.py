"""The GPU as the back end sees it: placement, staging, graphs, memory and the one wait, all through one object.

Checks without a GPU stand in for it: the interpreter's tests with tensors in host memory, the placement tests with fake ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kernels.gpu.tuning import CHIPS, Chip

_ALIGNMENT = 64  # bytes: what vector loads of any width want


class Graph(Protocol):
    """A captured run of kernels."""

    def replay(self) -> None: ...


class Device(Protocol):
    """Where tensors live and how work and data get there."""

    torch_device: torch.device
    chip: Chip
    use_ptx: bool  # inline assembly is NVIDIA's
    can_capture: bool

    def place(self, tensor: Tensor) -> Tensor:
        """A host tensor, copied to the device. For loading only: it may wait."""

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in host memory that the device can copy from and to without waiting."""

    def upload(self, target: Tensor, source: Tensor) -> Any:
        """Copies a host buffer to the device in stream order; does not wait. Returns what `reclaim` takes."""

    def reclaim(self, ticket: Any) -> None:
        """Returns once an upload has read its host buffer: at once, unless steps came without a download between them."""

    def download(self, target: Tensor, source: Tensor) -> Any:
        """Copies to a host buffer in stream order; does not wait. Returns what `wait` takes."""

    def wait(self, ticket: Any) -> None:
        """Waits for a download. The only wait of a step."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Records what `run` starts. `run` has been called before, so that nothing compiles or allocates for good in here."""

    def memory(self) -> tuple[int, int]:
        """Bytes: all, and free now."""


class CudaDevice:
    """The current CUDA (or ROCm) device of this process."""

    can_capture = True

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device is visible to this process")
        index = torch.cuda.current_device()
        self.torch_device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(index)
        self.use_ptx = torch.version.hip is None
        if self.use_ptx:
            arch = f"sm_{properties.major}{properties.minor}"
            if (properties.major, properties.minor) < (7, 5):
                raise ValueError(f"{properties.name} ({arch}) is too old: compute capability 7.5 is the least")
        else:
            arch = properties.gcnArchName.split(":")[0]
        known = [chip for chip in CHIPS.values() if chip.arch == arch]
        known = known or [CHIPS["A100-80GB" if self.use_ptx else "MI300X"]]
        nearest = min(known, key=lambda chip: abs(chip.num_sms - properties.multi_processor_count))
        self.chip = Chip(
            properties.name,
            arch,
            properties.multi_processor_count,
            nearest.clock_ghz,
            nearest.memory_gb_per_second,
            nearest.tensor_tflops,
            nearest.shared_nbytes,
        )
        self._pool: Any = None
        # By default cuBLAS may add the parts of a split K in 16 bit.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.torch_device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def upload(self, target: Tensor, source: Tensor) -> Any:
        return self.download(target, source)

    def reclaim(self, ticket: Any) -> None:
        ticket.synchronize()

    def download(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, ticket: Any) -> None:
        ticket.synchronize()

    def capture(self, run: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        return graph

    def memory(self) -> tuple[int, int]:
        torch.cuda.empty_cache()  # what the allocator keeps from loading is free too
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return total, free


def open_device() -> Device:
    """Raises ValueError, saying why, when this process has no usable GPU."""
    return CudaDevice()


class Staging:
    """Tensors with a place in host memory and the same place on the device, brought over by one copy.

    The host side is ordinary memory, free to be written at any time; a copy leaves from one of two pinned buffers in turn.
    """

    def __init__(self, device: Device, sizes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.device = device
        offsets, total = [], 0
        for shape, dtype in sizes:
            offsets.append(total)
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            total += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        self._host = torch.zeros(total, dtype=torch.uint8)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device.torch_device)
        self._pinned = [device.host_buffer((total,), torch.uint8) for _ in range(2)]
        self._tickets: list[Any] = [None, None]
        self._turn = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for offset, (shape, dtype) in zip(offsets, sizes, strict=True):
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            host, placed = (whole[offset:end].view(dtype).view(shape) for whole in (self._host, self._device))
            self.pairs.append((host, placed))

    def upload(self) -> None:
        turn, self._turn = self._turn, 1 - self._turn
        if self._tickets[turn] is not None:
            self.device.reclaim(self._tickets[turn])
        self._pinned[turn].copy_(self._host)
        self._tickets[turn] = self.device.upload(self._device, self._pinned[turn])
