"""Ahead-of-time compilation of launches, without a GPU, and what the binary says of them."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gpu.disassembly import TOOLS, Sass, disassemble
from kernels.gpu.launch import Launch

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """One binary. Counts of the hot loop are 0 for kernels without one; `spills` counts instructions or bytes, 0 is none."""

    arch: str
    seconds: float
    registers: int
    spills: int
    shared_nbytes: int
    opcodes: dict[str, int] = field(default_factory=dict)  # of the whole kernel, with modifiers
    loop: dict[str, int] = field(default_factory=dict)  # of the loop with the most tensor core instructions

    def count(self, prefix: str, in_loop: bool = False) -> int:
        counts = self.loop if in_loop else self.opcodes
        return sum(number for opcode, number in counts.items() if opcode.startswith(prefix))

    @property
    def loop_length(self) -> int:
        return sum(self.loop.values())


def target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def source(launch: Launch) -> ASTSource:
    """What Triton's JIT would compile for this launch: pointers and multiples of 16 divisible, ones constant."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.constants
    if set(values) != set(kernel.arg_names):
        raise ValueError(f"{kernel.__name__}: arguments {sorted(set(values) ^ set(kernel.arg_names))} do not match")
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(f"{kernel.__name__}: argument {name} is a {type(value).__name__}")
    return ASTSource(kernel, signature, constants, attributes)


def compile_launches(launches: list[Launch], arch: str) -> list[Compiled]:
    """Compiles for `arch` ("sm_80", "gfx942", ...) and reads the results back from the binaries."""
    kernels, seconds = [], []
    for launch in launches:
        started = time.perf_counter()
        options: dict[str, Any] = {
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": True,
        }
        if launch.max_registers is not None and arch.startswith("sm_"):
            options["maxnreg"] = launch.max_registers
        kernels.append(triton.compile(source(launch), target=target(arch), options=options))
        seconds.append(time.perf_counter() - started)
    if not arch.startswith("sm_"):
        pairs = zip(kernels, seconds, strict=True)
        return [_read_amd(kernel.asm["amdgcn"], arch, taken, kernel.metadata.shared) for kernel, taken in pairs]
    cubins = [kernel.asm["cubin"] for kernel in kernels]
    return [
        _read_nvidia(cubin, sass, arch, taken, kernel.metadata.shared)
        for kernel, cubin, sass, taken in zip(kernels, cubins, disassemble(cubins, arch), seconds, strict=True)
    ]


def _read_nvidia(cubin: bytes, sass: Sass, arch: str, seconds: float, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no register count: {usage[:200]!r}")
    counts = collections.Counter(sass.opcodes)
    local = sum(number for opcode, number in counts.items() if opcode.startswith(("STL", "LDL")))
    loop = dict(collections.Counter(sass.loop))
    return Compiled(arch, seconds, int(found[1]), local + int(found[2]), shared, dict(counts), loop)


def _read_amd(assembly: str, arch: str, seconds: float, shared: int) -> Compiled:
    def value(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, assembly)), default=0)

    # Scalar registers spill to lanes of vector registers, not to memory.
    spills = value(r"\.vgpr_spill_count:\s*(\d+)")
    opcodes = collections.Counter(re.findall(r"^\s+((?:v|s|ds|buffer|global)_\w+)", assembly, re.M))
    return Compiled(arch, seconds, value(r"\.vgpr_count:\s*(\d+)"), spills, shared, dict(opcodes))
