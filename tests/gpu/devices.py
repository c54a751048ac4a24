"""Stand-ins for `kernels.gpu.device.Device`: tensors in host memory for the interpreter, fake CUDA tensors for placement, and
a graph that records ops and replays them on poisoned inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.gpu.device import Graph
from kernels.gpu.tuning import CHIPS, Chip
from server.config import EngineConfig
from server.engine.engine import Engine, build_engine


class HostDevice:
    """Host memory; kernels run in the interpreter. With `static` given, graphs are captured by `RecordedGraph`."""

    use_ptx = True

    def __init__(self, chip: Chip = CHIPS["A100-80GB"], static: Callable[[], Iterable[Tensor]] | None = None) -> None:
        self.torch_device = torch.device("cpu")
        self.chip = chip
        self.can_capture = static is not None
        self.static = static
        self.waits = 0
        self.uploads = 0
        self.graphs: list[RecordedGraph] = []

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def upload(self, target: Tensor, source: Tensor) -> Any:
        self.uploads += 1
        target.copy_(source)
        return source

    def reclaim(self, ticket: Any) -> None:
        assert ticket is not None

    def download(self, target: Tensor, source: Tensor) -> Any:
        target.copy_(source)
        return None

    def wait(self, ticket: Any) -> None:
        self.waits += 1

    def capture(self, run: Callable[[], None]) -> Graph:
        assert self.static is not None
        self.graphs.append(RecordedGraph(run, self.static()))
        return self.graphs[-1]

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30


class RecordedGraph(TorchDispatchMode):
    """Records every op that `run` calls, with its tensors, and calls them again on replay: on the same memory, whatever
    Python would pass now. Before a replay all memory that is neither static nor a result of the recording is filled with NaN
    (or 77): a captured graph must not depend on what a step makes anew."""

    def __init__(self, run: Callable[[], None], static: Iterable[Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        with self:
            run()
        fixed = {tensor.untyped_storage().data_ptr() for tensor in static}
        made: set[int] = set()
        self.strangers: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}
        for _, args, kwargs, result in self.calls:
            for tensor in _tensors((args, kwargs)):
                place = tensor.untyped_storage().data_ptr()
                if place not in fixed and place not in made:
                    self.strangers.setdefault(place, tensor)
            for tensor in _tensors(result):
                place = tensor.untyped_storage().data_ptr()
                if place not in fixed:
                    made.add(place)
                    self.made[place] = tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for tensor in (*self.strangers.values(), *self.made.values()):
            poison(tensor)
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr() and func is not EMPTY:
                    old.copy_(new)


EMPTY = torch.ops.aten.empty.memory_format


def poison(tensor: Tensor) -> None:
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),), (1,))
    whole.fill_(float("nan") if tensor.dtype.is_floating_point else 77)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class FakeCudaDevice(HostDevice):
    """Fake tensors on a CUDA device that does not exist; to be used under FakeTensorMode. Crossing is done here alone."""

    def __init__(self, chip: Chip = CHIPS["H100-SXM"]) -> None:
        super().__init__(chip)
        self.torch_device = torch.device("cuda", 0)
        self.is_waiting = False

    def place(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu", "placed twice"
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.torch_device)

    def upload(self, target: Tensor, source: Tensor) -> Any:
        self._check(target, source)
        self.uploads += 1
        return source

    def download(self, target: Tensor, source: Tensor) -> Any:
        self._check(source, target)
        return None

    def _check(self, on_device: Tensor, on_host: Tensor) -> None:
        assert on_device.device == self.torch_device and on_host.device.type == "cpu", (
            on_device.device,
            on_host.device,
        )
        assert (on_device.shape, on_device.dtype) == (on_host.shape, on_host.dtype)

    def memory(self) -> tuple[int, int]:
        return 80 << 30, 79 << 30


class WithoutDeviceGuards(TorchFunctionMode):
    """A few methods of a CUDA tensor ask a CPU-only torch for a CUDA device before any op runs; here they go to the same ops
    without."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not (args and isinstance(args[0], Tensor) and args[0].device.type == "cuda"):
            return func(*args, **kwargs)
        if func is Tensor.__getitem__:
            return self._index(*args)
        if func is Tensor.contiguous:
            if args[0].is_contiguous():
                return args[0]
            return torch.ops.aten.clone.default(args[0], memory_format=torch.contiguous_format)
        if func in (Tensor.item, Tensor.tolist):
            return torch.ops.aten._local_scalar_dense.default(args[0])
        if func in (Tensor.float, Tensor.half):
            return args[0].to(torch.float32 if func is Tensor.float else torch.float16)
        return func(*args, **kwargs)

    def _index(self, tensor: Tensor, index: Any) -> Tensor:
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            missing = tensor.dim() - sum(item is not None for item in index) + 1
            index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
        dim = 0
        for item in index:
            if item is None:
                tensor = tensor.unsqueeze(dim)
                dim += 1
            elif isinstance(item, slice):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
                dim += 1
            elif isinstance(item, int):
                tensor = tensor.select(dim, item)
            else:
                raise NotImplementedError(f"index {item!r}")
        return tensor


def cuda_engine(checkpoint: Path, **options: Any) -> Engine:
    """An engine on what the `device` fixture stands in for; `options` are of `EngineConfig`."""
    return build_engine(
        EngineConfig(model=str(checkpoint), **{"device": "cuda", "seed": 0, "max_num_seqs": 5} | options)
    )
