"""Perplexity of a checkpoint, and how far its predictions are from the original's."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantizer.calibration_text import builtin_documents, pack_tokens
from quantizer.config import QuantConfig, QuantizeError
from quantizer.device import CPU, find_device, full_precision
from quantizer.documents import read_documents
from quantizer.export import REPORT_FILE, write_report
from quantizer.layouts import parse_quantization, quantized_modules, read_packed
from quantizer.mappings import attention_implementation, find_architecture
from quantizer.mixtures import loaded_tensors
from quantizer.sources import SafetensorsSource, Source, expected_shapes, open_source

BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Over `num_tokens` predicted tokens. Divergences are KL(reference || checkpoint) in nats per token."""

    num_tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_percentile_99: float | None = None
    top_1_agreement: float | None = None


class DequantizedSource:
    """A quantized checkpoint seen as a dense one: its quantized linears come as the fp32 weights a server computes with."""

    def __init__(self, source: SafetensorsSource, layout: str, quant_config: QuantConfig) -> None:
        self._source = source
        self._layout, self._group_size = layout, quant_config.group_size
        self._modules = quantized_modules(source.names(), layout)
        self.config = source.config

    def load(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return self._source.load(name)
        kinds = self._modules[module]
        return read_packed(module, kinds, self._source.load, self._layout, self._group_size).dequantize()


def load_model(
    source: Source | DequantizedSource, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> PreTrainedModel:
    """The transformers model with these weights, all in `dtype`, on `device`, in evaluation mode."""
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = attention_implementation(config)
    tensors = {name: source.load(name).to(device).to(dtype) for name in expected_shapes(config)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    # Rotary and scale buffers are not in the checkpoint; on the meta device they would have no values.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    tensors = loaded_tensors(find_architecture(config), tensors)
    embedding = model.model.embed_tokens
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    model.load_state_dict(tensors, assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> PreTrainedModel:
    """A checkpoint of a format written here (or a dense one) in transformers, its weights dequantized."""
    source = SafetensorsSource(folder)
    quantization = source.config_json.get("quantization_config")
    if quantization is None:
        return load_model(source, dtype, device)
    return load_model(DequantizedSource(source, *parse_quantization(quantization)), dtype, device)


@torch.no_grad()
@full_precision()
def evaluate(model: PreTrainedModel, rows: Tensor, reference: PreTrainedModel | None = None) -> Evaluation:
    """rows: int64 [sequences, length]; each row is scored by itself, its first token being given, not predicted."""
    nll = reference_nll = 0.0
    divergences, agreements, num_tokens = [], 0, 0
    for chunk in (chunk.to(model.device) for chunk in _chunks(rows)):
        targets = chunk[:, 1:]
        log_probs = _log_probs(model, chunk)
        nll += _negative_log_likelihood(log_probs, targets)
        num_tokens += targets.numel()
        if reference is not None:
            expected = _log_probs(reference, chunk)
            reference_nll += _negative_log_likelihood(expected, targets)
            agreements += int((expected.argmax(-1) == log_probs.argmax(-1)).sum())
            divergences.append((expected.exp() * (expected - log_probs)).sum(-1).reshape(-1))
    perplexity = math.exp(nll / num_tokens)
    if reference is None:
        return Evaluation(num_tokens, perplexity)
    divergence = torch.cat(divergences).double()
    return Evaluation(
        num_tokens,
        perplexity,
        reference_perplexity=math.exp(reference_nll / num_tokens),
        kl_mean=float(divergence.mean()),
        kl_percentile_99=float(divergence.sort().values[int(0.99 * (divergence.numel() - 1))]),
        top_1_agreement=agreements / num_tokens,
    )


def _chunks(rows: Tensor) -> Iterator[Tensor]:
    from tqdm import tqdm

    size = max(1, BATCH_TOKENS // rows.shape[1])
    yield from tqdm(rows.split(size), desc="evaluating", unit="batch", leave=False)


def _log_probs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """fp32 [sequences, length - 1, vocabulary]: the prediction of every token but the first."""
    return model(tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def _negative_log_likelihood(log_probs: Tensor, targets: Tensor) -> float:
    return -float(log_probs.gather(-1, targets.unsqueeze(-1)).sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class Size:
    """Of the safetensors files on disk, everything included, also per parameter of the dense model."""

    bytes: int
    bits_per_weight: float


def size_on_disk(folder: Path) -> Size:
    source = SafetensorsSource(folder)
    parameters = sum(math.prod(shape) for shape in expected_shapes(source.config).values())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return Size(stored, 8 * stored / parameters)


def evaluation_rows(tokenizer_source: SafetensorsSource, text: str, length: int, max_tokens: int) -> Tensor:
    """Token rows of a text: `builtin` is the held-out part of the builtin text, which no calibration sees."""
    tokenizer = tokenizer_source.tokenizer()
    documents = builtin_documents(held_out=True) if text == "builtin" else read_documents(text, tokenizer)
    rows = pack_tokens(tokenizer, documents, length)
    return rows[: max(1, max_tokens // length)] if max_tokens else rows


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="awq-quantize evaluate",
        description="Perplexity of an AWQ (or dense) checkpoint through its dequantized weights in fp32, and, beside a "
        "reference, KL divergence and how often both rank the same token first. The last line is JSON.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder that awq-quantize wrote")
    parser.add_argument("--reference", metavar="SOURCE", help="the original: folder, .gguf file or repository id")
    parser.add_argument(
        "--text",
        default="builtin",
        metavar="FILE",
        help="text or .jsonl to score; 'builtin' is the part of the builtin text that calibration leaves out "
        "(default: %(default)s)",
    )
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=32768, help="score at most these; 0 is all (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="that computes: auto (CUDA where there is one), cpu, cuda or cuda:N. Both models have to fit its memory "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--report", action="store_true", help="put the result into CHECKPOINT's quantization_report too"
    )
    hub = parser.add_argument_group("Hugging Face hub, for --reference")
    hub.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    hub.add_argument("--offline", action="store_true", help="use only the local hub cache")
    return parser


def main(argv: Sequence[str]) -> int:
    """`awq-quantize evaluate`; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    if arguments.sequence_length < 2:
        raise QuantizeError(f"sequence_length: {arguments.sequence_length} is below the minimum of 2")
    if not arguments.checkpoint.is_dir():
        raise QuantizeError(f"{arguments.checkpoint}: no such folder")
    device = find_device(arguments.device)
    checkpoint = SafetensorsSource(arguments.checkpoint)
    rows = evaluation_rows(checkpoint, arguments.text, arguments.sequence_length, arguments.max_tokens)
    reference = None
    if arguments.reference:
        source = open_source(arguments.reference, arguments.revision, arguments.offline)
        reference = load_model(source, device=device)
    evaluation = evaluate(load_checkpoint(arguments.checkpoint, device=device), rows, reference)
    result = {**asdict(evaluation), **asdict(size_on_disk(arguments.checkpoint))}
    if arguments.report:
        add_to_report(arguments.checkpoint, {"text": arguments.text, **result})
    print_evaluation(result)
    return 0


def add_to_report(folder: Path, evaluation: dict[str, Any]) -> None:
    """Puts an evaluation into the report that lies beside the weights."""
    path = folder / REPORT_FILE
    if not path.is_file():
        raise QuantizeError(f"{path}: no such file; --report is for checkpoints that awq-quantize wrote")
    write_report(folder, {**json.loads(path.read_text()), "evaluation": evaluation})


def print_evaluation(data: dict[str, Any]) -> None:
    """A table for people, then one line of JSON. data: the fields of an Evaluation and a Size."""
    labels = {
        "num_tokens": "tokens scored",
        "reference_perplexity": "perplexity, original",
        "perplexity": "perplexity, checkpoint",
        "kl_mean": "KL divergence, mean",
        "kl_percentile_99": "KL divergence, 99th percentile",
        "top_1_agreement": "same first choice",
        "bytes": "bytes on disk",
        "bits_per_weight": "bits per weight on disk",
    }
    for key, label in labels.items():
        if data[key] is not None:
            print(f"{label:32s} {data[key]:.5g}" if isinstance(data[key], float) else f"{label:32s} {data[key]}")
    print(json.dumps(data))
