"""The native kernels' tests again, on a build with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizer libraries")
def test_native_kernels_are_clean_under_sanitizers() -> None:
    script = Path(__file__).with_name("run_sanitized.sh")
    finished = subprocess.run([str(script), sys.executable], capture_output=True, text=True, timeout=3600)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
