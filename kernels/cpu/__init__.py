"""Native CPU kernels: C++ in csrc/, built by setup.py into `_native`, used through `kernels.cpu.backend`."""
