"""Ahead-of-time compilation against the ceilings, in processes of their own (this one interprets), and the checks' own
tests."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.gpu.cases import ARCHES
from kernels.gpu.tuning import CHIPS

ROOT = Path(__file__).parent.parent.parent

SASS = """
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   EXIT ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64] ;
        /*0030*/                   LOP3.LUT R8, R8, 0xf000f, R9, 0xea, !PT ;
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/              @!P0 I2F.F16 R8, R9 ;
        /*0060*/               @P1 BRA 0x20 ;
        /*0070*/                   STL [R1], R4 ;
        /*0080*/                   BRA 0x70;
"""

READ = f"""
from kernels.gpu.disassembly import read_sass
print([(kernel.opcodes, kernel.loop) for kernel in read_sass({SASS!r}, [32, 112])])
"""

PLANTED = """
import dataclasses, sys
from kernels.gpu import cases, check
from kernels.gpu.aot import Compiled, compile_launches
case = next(case for case in cases.gemm_cases("sm_80", short=True))
good = Compiled("sm_80", 0.0, 128, 0, 40000, {"HMMA": 32}, {"HMMA.16816.F32": 32, "LDGSTS.E.BYPASS.128": 4, "LOP3.LUT": 200})
print(check.faults(case, good))
for change in ({"spills": 1}, {"registers": 129}, {"opcodes": {"I2F.F16": 1}}, {"shared_nbytes": 200 << 10},
               {"loop": {"LDGSTS.E.BYPASS.128": 4, "LOP3.LUT": 400}}, {"loop": {"LDGSTS.E.64": 4}}):
    assert check.faults(case, dataclasses.replace(good, **change)), change
large = dataclasses.replace(case, block_m=128, label="M<=128")
assert any("HGMMA" in fault for fault in check.faults(large, dataclasses.replace(good, arch="sm_90")))
# A kernel that converts every weight, compiled: the checks must see it.
import triton, triton.language as tl, torch
from kernels.gpu.launch import Launch
@triton.jit
def converting(words_ptr, out_ptr):
    lanes = tl.arange(0, 128)
    tl.store(out_ptr + lanes, (tl.load(words_ptr + lanes) & 15).to(tl.float16))
meta = lambda dtype: torch.empty(128, dtype=dtype, device="meta")
[planted] = compile_launches([Launch(converting, (1,), (meta(torch.int16), meta(torch.float16)), {}, 4, 1)], "sm_80")
assert planted.count("I2F"), planted
"""


def run(*arguments: str, timeout: int = 3000) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_checks_see_what_they_look_for() -> None:
    (first, no_loop), (opcodes, loop) = eval(run("-c", READ))
    assert first == ["MOV", "EXIT"] and not no_loop
    assert opcodes[0] == "LDGSTS.E.BYPASS.128" and opcodes[-2:] == ["STL", "BRA"]
    assert loop == ["LDGSTS.E.BYPASS.128", "LOP3.LUT", "HMMA.16816.F32", "I2F.F16", "BRA"]
    run("-c", PLANTED_FILE)


PLANTED_FILE = f"""
import pathlib, runpy, tempfile
with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, "planted.py")  # kernels are compiled from files
    path.write_text({PLANTED!r})
    runpy.run_path(str(path))
"""


def test_one_configuration_of_every_kernel_compiles_within_its_ceilings() -> None:
    output = run("-m", "kernels.gpu.check", "--short", "--arch", "sm_90")
    assert " 0 faults" in output.splitlines()[-1]


@pytest.mark.slow
def test_every_configuration_compiles_within_its_ceilings_on_every_architecture() -> None:
    """In one command, which compiles for as many architectures at once as there are cores."""
    output = run("-m", "kernels.gpu.check")
    assert " 0 faults" in output.splitlines()[-1]
    compiled = {line.split(" | ")[0].removeprefix("| ") for line in output.splitlines() if line.startswith("| ")}
    assert compiled >= set(ARCHES)


def test_tuning_keeps_the_fastest_and_survives_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from kernels.gpu import autotune

    chip, shape = CHIPS["H100-SXM"], (4096, 4096, 128)
    every = list(autotune.candidates(chip, 8, *shape))
    assert len(set(every)) == len(every) > 10
    wanted = every[7]
    tuned = autotune.tune(chip, [shape], "float16", lambda config, *_: float(config != wanted))
    assert tuned[autotune.key_of(8, *shape, "float16")] == wanted
    path = tmp_path / "cache" / "tuning.json"
    autotune.save(path, tuned)
    loaded = autotune.load(path)
    assert loaded == tuned and autotune.choose(chip, loaded, 5, *shape, "float16") == wanted
    assert autotune.choose(chip, loaded, 5, *shape, "bfloat16") == every[0]
    for damage in ("{", "[]", '{"version": 0, "configs": {}}', '{"version": 1, "configs": {"a": {"b": 1}}}'):
        path.write_text(damage)
        assert autotune.load(path) == {}
    assert caplog.text.count("not used") == 4


def test_tuned_configurations_are_within_reach_of_the_policy() -> None:
    from kernels.gpu import autotune
    from kernels.gpu.tuning import DECODE_ROWS

    for rows in DECODE_ROWS:
        for config in autotune.candidates(CHIPS["A100-80GB"], rows, 4096, 4096, 64):
            assert replace(config, num_stages=4).block_m == rows and config.num_parts <= 16
    assert torch.float16.itemsize == 2
