"""Triton kernels for NVIDIA and AMD GPUs, and the back end over them. Importing queries no device."""
