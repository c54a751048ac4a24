"""Builds the native CPU kernels, kernels/cpu/_native. All else stands in pyproject.toml.

One translation unit per instruction set, each with its own flags; which one runs is decided at run time. The extension is
optional: without a C++ compiler the package installs and the server says at start what is slower.

AWQ_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (see tests/kernels/run_sanitized.sh).
"""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nanobind
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE_FOLDER = Path("kernels/cpu/csrc")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
SANITIZE = os.environ.get("AWQ_SANITIZE") == "1"

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mavx512dq"]
# No contraction: which products join a sum must not depend on what the compiler inlines where, or the same row could get
# different bits on two paths. Fused multiply-adds are written out.
COMMON_FLAGS = [
    "-std=c++17",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-Wno-psabi",
]
WARNING_FLAGS = ["-Wall", "-Wextra"]
OPTIMIZE_FLAGS = ["-O3"]
SANITIZE_FLAGS = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]


def native_sources() -> list[str]:
    return [str(path) for path in sorted(SOURCE_FOLDER.glob("*.cpp")) if IS_X86 or "_avx" not in path.name]


def flags_for(source: str) -> list[str]:
    flags = [*COMMON_FLAGS, *(SANITIZE_FLAGS if SANITIZE else OPTIMIZE_FLAGS)]
    if str(SOURCE_FOLDER) in source:
        flags += WARNING_FLAGS
    if source.endswith("_avx2.cpp"):
        flags += AVX2_FLAGS
    if source.endswith("_avx512.cpp"):
        flags += AVX512_FLAGS
    return flags


class BuildNative(build_ext):
    """Compiles each source with the flags of its instruction set, several at a time, and only what has changed."""

    def run(self) -> None:
        # A build in place that fails must not leave an older one to be imported beside Python code that is not its own.
        if self.inplace:
            for extension in self.extensions:
                Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()

    def build_extension(self, extension: Extension) -> None:
        headers = max(path.stat().st_mtime for path in [*SOURCE_FOLDER.glob("*.h"), Path(__file__)])
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            # nanobind's own source is outside the project, and what setuptools is told of must lie inside.
            sources = [*extension.sources, str(Path(nanobind.source_dir()) / "nb_combined.cpp")]
            objects = list(threads.map(lambda source: self._compile(extension, source, headers), sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            extra_postargs=["-pthread", *(["-fsanitize=address,undefined"] if SANITIZE else ["-s"])],
            target_lang="c++",
        )

    def _compile(self, extension: Extension, source: str, newest_header: float) -> str:
        folder = f"{self.build_temp}{'-sanitized' if SANITIZE else ''}"
        (target,) = self.compiler.object_filenames([source], strip_dir=True, output_dir=folder)
        newest = max(newest_header, Path(source).stat().st_mtime)
        if not (Path(target).exists() and Path(target).stat().st_mtime > newest):
            include_dirs = [*self.compiler.include_dirs, *extension.include_dirs]
            command = [*self.compiler.compiler_so_cxx, *(f"-I{path}" for path in include_dirs), *flags_for(source)]
            self.compiler.mkpath(folder)
            try:
                subprocess.run([*command, "-c", source, "-o", target], check=True)
            except (OSError, subprocess.CalledProcessError) as error:  # what `optional` lets pass, with a warning
                raise CompileError(f"{source}: {error}") from error
        return target


nanobind_folder = Path(nanobind.include_dir()).parent

setup(
    ext_modules=[
        Extension(
            "kernels.cpu._native",
            sources=native_sources(),
            include_dirs=[nanobind.include_dir(), str(nanobind_folder / "ext" / "robin_map" / "include")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
