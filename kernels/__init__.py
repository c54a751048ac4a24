"""Tensors in, tensors out: the quantized format, the back ends and their reference.

Importing this package does no work and queries no device; `kernels.choice.create_backend` chooses a back end.
"""
