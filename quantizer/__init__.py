"""Offline quantizer: a Hugging Face or GGUF checkpoint in, a 4-bit AWQ checkpoint out (`awq-quantize`)."""
