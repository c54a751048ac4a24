"""What Triton's interpreter lacks: bfloat16 arithmetic, which it computes on raw bit patterns, inline PTX, and products whose
rows do not depend on each other.

`install` mends both in place; `tests/gpu/test_interpreter.py` tests the mends.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widen(handle: Any) -> Any:
    return Handle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(data: np.ndarray) -> Any:
    return Handle(fp32_to_bf16(data), tl.bfloat16)


def install() -> None:
    """Patches the interpreter once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "mended", False):
        return
    builder.mended = True
    cast = builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        # In fp64, rounded once: numpy's fp32 product depends on the number of rows, which a tensor core's does not.
        product = np.matmul(_widen(a).data, _widen(b).data, dtype=np.float64)
        return Handle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if _is_bf16(source) and target.scalar == tl.bfloat16:
            return source
        if target.scalar == tl.bfloat16:
            return _narrow(_widen(source).data.astype(np.float32))
        return cast(self, _widen(source), target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    convert = builder.create_fp_to_fp
    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    for name in ("binary_op", "ternary_op", "unary_op"):
        setattr(builder, name, _elementwise(getattr(builder, name)))
    builder.create_inline_asm = create_inline_asm
    fma = builder.create_fma

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if _is_bf16(z):
            wide = [_widen(part).data.astype(np.float64) for part in (x, y, z)]
            return _narrow(wide[0] * wide[1] + wide[2])
        return fma(self, x, y, z)

    builder.create_fma = create_fma


def _elementwise(original: Callable[..., Any]) -> Callable[..., Any]:
    def mended(self: Any, *args: Any) -> Any:
        *handles, function = args
        if not any(map(_is_bf16, handles)):
            return original(self, *args)
        output = function(*(_widen(handle).data for handle in handles))
        return Handle(output, tl.int1) if output.dtype == np.bool_ else _narrow(output)

    return mended


def _halves(words: np.ndarray) -> np.ndarray:
    return words.view(np.float16).reshape(-1, 2)


def _words(halves: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(halves.astype(np.float16)).reshape(-1).view(np.uint32)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    result = np.zeros_like(a)
    for index in range(8):
        if table >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def run_ptx(text: str, inputs: list[np.ndarray], num_outputs: int) -> list[np.ndarray]:
    """Runs PTX statements on vectors of 32-bit registers; $0.. are the outputs, then the inputs. Raises NotImplementedError
    for an opcode it does not know."""
    size = inputs[0].size
    registers = {f"${num_outputs + index}": value for index, value in enumerate(inputs)}

    def read(token: str) -> np.ndarray:
        return registers[token] if token in registers else np.full(size, int(token, 0) & 0xFFFFFFFF, np.uint32)

    for statement in re.sub(r"[{}]", "", text).split(";"):
        statement = statement.strip()
        if not statement or statement.startswith(".reg"):
            continue
        opcode, operands = statement.split(None, 1)
        target, *sources = (part.strip() for part in operands.split(","))
        if opcode == "mov.b32":
            registers[target] = read(sources[0])
        elif opcode == "shr.u32":
            registers[target] = read(sources[0]) >> read(sources[1])
        elif opcode == "lop3.b32":
            registers[target] = _lop3(*map(read, sources[:3]), int(sources[3], 0))
        elif opcode == "sub.f16x2":
            registers[target] = _words(_halves(read(sources[0])) - _halves(read(sources[1])))
        else:
            raise NotImplementedError(f"PTX opcode {opcode}")
    return [registers[f"${index}"] for index in range(num_outputs)]


def create_inline_asm(
    self: Any, text: str, constraints: str, values: list[Any], types: Any, is_pure: bool, pack: int
) -> Any:
    types = list(types) if isinstance(types, list | tuple) else [types]
    shape = values[0].data.shape
    assert all(value.data.dtype.itemsize * pack == 4 for value in values), "registers of 32 bits only"
    inputs = [np.ascontiguousarray(value.data).reshape(-1).view(np.uint32) for value in values]
    outputs = run_ptx(text, inputs, len(types))

    class Result:
        def get_result(self, index: int) -> Any:
            scalar = types[index].scalar
            data = outputs[index].view(interpreter._get_np_dtype(scalar)).reshape(shape)
            return Handle(data, scalar)

    return Result()
