"""Machine code of cubins back into opcodes. One call of nvdisasm for many: it takes longer to start than to disassemble."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)(.*)")
_TARGET = re.compile(r" 0x([0-9a-f]+)\s*;")
_FIRST_WITH_FEATURES = 90  # from here on code is compiled for the architecture's own features, whose names end in "a"


@dataclass(frozen=True, slots=True)
class Sass:
    """Opcodes with their modifiers, in order: of the whole kernel, and of the loop (the range of a backward branch) with the most
    tensor core instructions; empty where no loop has any."""

    opcodes: list[str]
    loop: list[str]


def disassemble(cubins: list[bytes], arch: str) -> list[Sass]:
    """Of each cubin's one kernel. `arch` as in "sm_80". Raises RuntimeError with nvdisasm's words."""
    texts = [kernel_code(cubin) for cubin in cubins]
    number = int(arch.removeprefix("sm_"))
    name = f"SM{number}" + "a" * (number >= _FIRST_WITH_FEATURES)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "--no-dataflow", "--binary", name, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()[:400]}")
    return read_sass(done.stdout, [len(text) for text in texts])


def kernel_code(cubin: bytes) -> bytes:
    """The section `.text.NAME` of a cubin, which is a 64-bit little-endian ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    entry_size, num_sections, names_index = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * entry_size) for index in range(num_sections)]
    names = sections[names_index][4]
    for name, _, _, _, offset, size in sections:
        if cubin.startswith(b".text.", names + name):
            return cubin[offset : offset + size]
    raise RuntimeError("a cubin without a kernel")


def read_sass(text: str, sizes: list[int]) -> list[Sass]:
    """Of kernels that were laid end to end, with their `sizes` in bytes."""
    found = [match for match in map(_INSTRUCTION.match, text.splitlines()) if match]
    addresses = [int(match[1], 16) for match in found]
    kernels, begin = [], 0
    for size in sizes:
        first, last = bisect_left(addresses, begin), bisect_left(addresses, begin + size)
        opcodes = [match[2] for match in found[first:last]]
        jumps = [
            (index, bisect_left(addresses, int(jump[1], 16)) - first)
            for index, match in enumerate(found[first:last])
            if match[2].startswith("BRA") and (jump := _TARGET.search(match[3]))
        ]
        loops = [opcodes[target : index + 1] for index, target in jumps if 0 <= target <= index]
        most = max(loops, key=_num_products, default=[])
        kernels.append(Sass(opcodes, most if _num_products(most) else []))
        begin += size
    return kernels


def _num_products(opcodes: list[str]) -> int:
    return sum("MMA" in opcode for opcode in opcodes)
