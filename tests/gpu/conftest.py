"""Kernels run in Triton's interpreter here. The variable must be set before triton is first imported in this process."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from tests.gpu import interpreter

interpreter.install()
