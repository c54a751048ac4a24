"""The native linears without Python around them: under AddressSanitizer and UndefinedBehaviorSanitizer, in every instruction set
that this machine runs and in AVX-512 emulated by SIMDe (Debian: libsimde-dev)."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "kernels/cpu/csrc"
HARNESS = ROOT / "tests/kernels/cpu_harness/linear_test.cpp"
IS_X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"]
FLAGS = [
    *("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno"),
    f"-I{SOURCES}",
]
SANITIZE = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def compiler() -> str:
    name = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not name:
        pytest.skip("no C++ compiler: the native linears are NOT tested under sanitizers")
    return name


def has_simde(cxx: str, folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("#include <simde/x86/avx512.h>\n")
    return subprocess.run([cxx, *AVX2, "-fsyntax-only", str(probe)], capture_output=True, check=False).returncode == 0


def build(cxx: str, folder: Path, emulate: bool, sanitize: bool) -> Path:
    """The harness with the linears in all instruction sets; AVX-512 on SIMDe if `emulate`."""
    units = {"huge_pages": [], "linear_pack": [], "linear_dispatch": [], "linear_generic": []}  # type: dict[str, list[str]]
    if IS_X86:
        units |= {"linear_avx2": AVX2, "quantize_avx2": AVX2, "linear_avx512": AVX2 if emulate else AVX512}
    common = [cxx, *FLAGS, *(SANITIZE if sanitize else []), *(["-DAWQ_CPU_EMULATE_AVX512"] if emulate else [])]
    commands = {str(folder / f"{name}.o"): [str(SOURCES / f"{name}.cpp"), *flags] for name, flags in units.items()}
    commands[str(folder / "harness.o")] = [str(HARNESS)]

    def compile_unit(target: str) -> None:
        subprocess.run([*common, *commands[target], "-c", "-o", target], check=True)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(compile_unit, commands))
    program = folder / "linear_test"
    subprocess.run([*common, *commands, "-o", str(program)], check=True)
    return program


def run(program: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "AWQ_CPU_ISA"}
    result = subprocess.run([str(program), "quick"], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("sanitize", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_harness(tmp_path: Path, sanitize: bool) -> None:
    """Emulated AVX-512 is code like any other, so it is sanitized too."""
    cxx = compiler()
    emulate = IS_X86 and has_simde(cxx, tmp_path)
    output = run(build(cxx, tmp_path, emulate, sanitize))
    assert "ok:" in output and "generic:" in output
    if emulate:
        assert "avx512:" in output
    elif IS_X86 and "avx512:" not in output:
        pytest.skip("SIMDe is missing (apt-get install libsimde-dev): AVX-512 kernels were NOT tested on this machine")
