"""Fixtures that tests share. The demo model is quantized once, by `make`, and shared by all."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

# Two tests run at a time (see pyproject.toml), so each computes with one thread; servers that tests start inherit it. Set before
# torch is imported, and passive: threads that spin at barriers starve each other when cores are short.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# A failure can be seen again: hypothesis takes the same examples every time. `HYPOTHESIS_PROFILE=explore` looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

DEMO_MODEL = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct-awq"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """Random tensors depend on the test's name, not on the tests that ran before it in the same worker."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The quantized demo checkpoint. `make test` makes it; a bare pytest run says what to do."""
    if not (DEMO_MODEL / "config.json").is_file():
        pytest.fail(f"{DEMO_MODEL} is missing: run `make {DEMO_MODEL.relative_to(DEMO_MODEL.parent.parent)}` first")
    return DEMO_MODEL
