"""Decoders over the kernel boundary: one decoder with flags, its layers, and the loader of checkpoints."""
