"""The law of load independence, bitwise, for a mixture of experts with a shared one, on the native kernels. (All architectures:
tests/test_architectures.py, in `make check`.)"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from server.types import GenerateRequest, SamplingParams
from tests.awq_checkpoints import make_awq_checkpoint
from tests.kernels.cpu_support import needs_native
from tests.server.engine.test_load_independence import builder, check_law
from tests.server.models.test_decoder import random_tokens
from tests.tiny_models import add_tokenizer, make_tiny_model

LONGEST = 90


def requests(count: int = 12) -> list[GenerateRequest]:
    """Greedy and sampled, prompts of 1 to LONGEST tokens, some of which begin alike."""
    text, found = random_tokens(400), []
    for index in range(count):
        start = 0 if index % 3 == 0 else 31 * index
        sampling = SamplingParams(12, temperature=0.0 if index % 2 else 0.9, top_p=0.95, seed=index, ignore_eos=True)
        prompt = text[start : start + 1 + (index * 53) % LONGEST]
        found.append(GenerateRequest(f"r{index}", prompt, sampling, time.monotonic()))
    return found


@needs_native
def test_a_mixtures_answers_do_not_depend_on_the_load(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "source", "qwen2_moe", torch.float16)
    make_awq_checkpoint(source, tmp_path / "awq", tmp_path / "dense", 32)
    add_tokenizer(tmp_path / "awq")
    try:
        check_law(builder(tmp_path / "awq", "cpu", 2, LONGEST), requests())
    finally:
        torch.set_num_threads(1)
