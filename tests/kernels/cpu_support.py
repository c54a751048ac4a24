"""What tests of the native CPU kernels share."""

from __future__ import annotations

import importlib

import pytest

try:
    importlib.import_module("kernels.cpu._native")
    _reason = ""
except ImportError as error:
    _reason = str(error)

needs_native = pytest.mark.skipif(bool(_reason), reason=f"the native CPU kernels are not built: {_reason}")
