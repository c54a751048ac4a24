"""A GGUF file written from a tiny checkpoint reads back as that checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from quantizer.config import QuantizeError
from quantizer.gguf_source import GgufSource, unpermute
from quantizer.sources import SafetensorsSource, check_tensors, open_source


def _interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: row i and i + half become neighbours."""
    half = values.shape[0] // num_heads // 2
    return values.reshape(num_heads, 2, half, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _write_gguf(path: Path, folder: Path, tokenizer: PreTrainedTokenizerFast, extra: str | None = None) -> None:
    source = SafetensorsSource(folder)
    config, architecture = source.config, source.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    for name in sorted(source.names()):
        stem, _, suffix = name.rpartition(".")
        values = source.load(name).float().numpy()
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = np.ascontiguousarray(_interleave(values, heads))
        if stem.endswith("down_proj"):  # a quantized type among the others
            quantized = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", values)
    if extra:
        writer.add_tensor(extra, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_gguf_equals_the_checkpoint_it_was_made_from(
    kind: str, make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = make_checkpoint(kind)
    path = tmp_path / "model.gguf"
    _write_gguf(path, folder, tiny_tokenizer)
    original, source = open_source(str(folder)), open_source(str(path))
    assert isinstance(source, GgufSource)
    assert source.config_json["architectures"] == original.config_json["architectures"]
    shapes = check_tensors(original)
    assert check_tensors(source) == shapes
    for name in shapes:
        tolerance = 0.02 if "down_proj" in name else 0.0
        assert torch.allclose(source.load(name), original.load(name).float(), rtol=0, atol=tolerance), name


def test_gguf_tokenizer_splits_digits_and_is_written_whole(
    make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    _write_gguf(path, make_checkpoint("llama"), tiny_tokenizer)
    source = open_source(str(path))
    pieces = source.tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str("in  1984, yes")
    assert [piece for piece, _ in pieces] == ["in", "ĠĠ", "1", "9", "8", "4", ",", "Ġyes"]
    out = tmp_path / "out"
    out.mkdir()
    source.write_side_files(out)
    written = {file.name for file in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= written
    assert '"eos_token_id": 2' in (out / "generation_config.json").read_text()


def test_unpermute_inverts_the_interleaving() -> None:
    for shape in ((64, 5), (64,)):
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        assert not np.array_equal(_interleave(values, 4), values)
        assert np.array_equal(unpermute(_interleave(values, 4), 4), values)


def test_tensors_that_cannot_be_converted_are_named(
    make_checkpoint: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    _write_gguf(path, make_checkpoint("llama"), tiny_tokenizer, extra="rope_freqs.weight")
    with pytest.raises(QuantizeError, match=r"cannot convert tensor rope_freqs\.weight"):
        open_source(str(path))
    path.write_bytes(b"GGML nonsense")
    with pytest.raises(QuantizeError, match="not a readable GGUF"):
        open_source(str(path))


def test_the_file_is_parsed_once(
    make_checkpoint: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _write_gguf(tmp_path / "model.gguf", make_checkpoint("qwen3"), tiny_tokenizer)
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: pytest.fail(f"{path} is opened again"))
    source = GgufSource(tmp_path / "model.gguf")
    assert source.tokenizer().vocab_size == len(tiny_tokenizer)
