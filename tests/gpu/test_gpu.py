"""On a real GPU (`make test-gpu`): every kernel compiled and run against the reference. Skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_everything_on_this_gpu() -> None:
    """In a process of its own: this one interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-m", "kernels.gpu.selftest"], cwd=ROOT, env=environment, check=True, timeout=3000)
