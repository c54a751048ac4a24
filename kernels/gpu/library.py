"""Every kernel wrapper is a `torch.library` op in the namespace `awq_serve`: fake tensors, dispatch modes and tracers see
it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.gpu import launch as launching

LIBRARY = torch.library.Library("awq_serve", "DEF")


def define(
    schema: str, implementation: Callable[..., None], check: Callable[..., None] | None = None
) -> Callable[..., None]:
    """Registers an op that writes to its arguments and returns nothing. `check` is what the fake runs where the implementation
    computes by more than launches.

    The fake runs the implementation, which reads no data, with nothing launched: all its checks of shapes and dtypes hold
    under fake tensors too. It adds the one that kernels cannot make: that all tensors are on one device.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")

    def fake(*args: Any, **kwargs: Any) -> None:
        expect_one_device(name, [*args, *kwargs.values()])
        run = check or implementation
        if launching.is_intercepted():
            run(*args, **kwargs)
        else:
            with launching.intercept(lambda launch: None):
                run(*args, **kwargs)

    torch.library.register_fake(f"awq_serve::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.awq_serve, name)


def expect_one_device(name: str, values: list[Any]) -> None:
    """Raises RuntimeError naming the op and the devices when its tensors are on several."""
    devices = {str(value.device) for value in values if isinstance(value, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"awq_serve::{name}: tensors on several devices: {', '.join(sorted(devices))}")


def expect(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {message}")
