"""Tiny checkpoints with a tokenizer, so that whole quantizations take a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quantizer.calibration_text import builtin_documents
from tests.tiny_models import make_tiny_model

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 320 tokens, with a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(builtin_documents()[:20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


@pytest.fixture
def make_checkpoint(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """make_checkpoint(kind, dtype=..., **overrides) -> folder of a complete checkpoint."""

    def make(kind: str, dtype: torch.dtype = torch.float32, name: str = "source", **overrides: Any) -> Path:
        folder = make_tiny_model(tmp_path / name, kind, dtype, **overrides)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make
