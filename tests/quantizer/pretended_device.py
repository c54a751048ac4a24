"""A CUDA device that does not exist, with values: tensors that say `cuda:0` and are computed on the CPU, by the CPU's own kernels.

Unlike under fake tensors the arithmetic is done, so that what a quantization writes can be compared with the CPU's byte for byte;
and as on a GPU no operation takes tensors from both sides, but for the few that torch lets. What torch refuses there is refused
here in its words. What this cannot show is what a GPU's own kernels compute, and how fast.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("cuda", 0)
NAME = "Pretended GPU"

_aten = torch.ops.aten
_INDEXING = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_READING = {
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.item,
    torch.Tensor.nonzero,
}
_MOVING = {torch.Tensor.copy_, torch.Tensor.contiguous}
_UNDISPATCHED = {torch.nn.functional.scaled_dot_product_attention, *_INDEXING, *_MOVING, *_READING}


class PretendedTensor(torch.Tensor):
    """`inner`: the plain tensor that holds its values. Views share memory as views do, since their inner tensors are views."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> PretendedTensor:
        assert type(inner) is torch.Tensor and inner.device.type == "cpu"
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self) -> str:
        return f"Pretended({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on the pretended device, outside of it")


class PretendedDevice(TorchDispatchMode):
    """All operations while it lasts. `reads` counts values fetched from the device into Python, each of which a GPU would be
    waited for; `on_host` the operations on host tensors of one dimension or more, by name; `launches` those on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.launches = 0
        self.on_host = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = _tensors((args, *kwargs.values()))
        ours = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, PretendedTensor)}
        wanted = kwargs.get("device")
        to_device = bool(ours) if wanted is None else _is_pretended(wanted)
        if wanted is not None and to_device:
            kwargs["device"] = torch.device("cpu")
        if func is _aten.copy_.default:
            to_device = isinstance(args[0], PretendedTensor)
        elif ours and func is not _aten._to_copy.default:
            _check_same_device(func, args, tensors)
        result = func(*_inward(args), **{name: _inward(value) for name, value in kwargs.items()})
        if ours or to_device:
            self.launches += 1
        elif any(tensor.device.type == "cpu" and tensor.dim() for tensor in (*tensors, *_tensors(result))):
            self.on_host[str(func)] += 1
        return _outward(result, ours) if to_device else result


class _Undispatched(TorchFunctionMode):
    """What torch does by device before it dispatches: it chooses attention's kernel, here as on the CPU, and to index or to read a
    tensor it makes the device current, which a build without CUDA cannot."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and _is_pretended(kwargs.get("device")):
            with _disable_current_modes():
                return PretendedTensor(func(*args, **{**kwargs, "device": "cpu"}))
        if func not in _UNDISPATCHED or not isinstance(args[0], PretendedTensor):
            return func(*args, **kwargs)
        if func is not torch.Tensor.copy_:
            _check_same_device(func, args, _tensors((args, *kwargs.values())))
        with _disable_current_modes():
            result = func(*_inward(args), **{name: _inward(value) for name, value in kwargs.items()})
        self.device.reads += func in _READING
        return _outward(result, {id(args[0].inner): args[0]})


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch, free_bytes: int = 8_000_000_000) -> Iterator[PretendedDevice]:
    """While it lasts torch finds one CUDA device, PretendedDevice."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": NAME,
        "mem_get_info": (free_bytes, free_bytes),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 12345,
        "synchronize": None,
        "_lazy_init": None,
    }
    with monkeypatch.context() as patch, PretendedDevice() as device, _Undispatched(device):
        for function, answer in answers.items():
            patch.setattr(torch.cuda, function, lambda *arguments, answer=answer: answer)
        yield device


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _tensors(value: Any) -> list[torch.Tensor]:
    """All in nested tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _inward(value: Any) -> Any:
    """The same with the plain tensors that hold the values."""
    if isinstance(value, PretendedTensor):
        return value.inner
    return type(value)(map(_inward, value)) if type(value) in (list, tuple) else value


def _outward(value: Any, known: dict[int, PretendedTensor]) -> Any:
    """The same with pretended tensors; what was written in place stays the tensor it was. known: by their inner tensors' ids."""
    if isinstance(value, torch.Tensor):
        return known[id(value)] if id(value) in known else PretendedTensor(value)
    return type(value)(_outward(item, known) for item in value) if type(value) in (list, tuple) else value


def _check_same_device(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """RuntimeError as torch's. On a GPU only a scalar of the host may join, and only element by element; or indices may."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    if func in _INDEXING:
        strangers = [tensor for tensor in strangers if not any(tensor is index for index in _tensors(args[1]))]
    pointwise = func in _INDEXING or torch.Tag.pointwise in getattr(func, "tags", ())
    if any(tensor.dim() or not pointwise for tensor in strangers):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})"
        )
