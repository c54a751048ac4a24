"""The engine: continuous batching over a paged KV cache. It speaks token ids only and runs in a process of its own."""
