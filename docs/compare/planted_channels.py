"""What each part of the quantizer is worth on random models with planted salient channels, whose weights were never rounded.

    python docs/compare/planted_channels.py

In every layer a few channels of each linear's inputs are loud: those of the norms, of v's rows and of up's. Calibrated on the
builtin text, scored on the part of it that is held out. Figures are means over models. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quantizer.calibration_text import builtin_documents
from quantizer.config import QuantizeOptions
from quantizer.evaluate import evaluate, evaluation_rows, load_checkpoint
from quantizer.run import quantize
from quantizer.sources import SafetensorsSource

VOCABULARY = 2048
HIDDEN_SIZE = 256
SALIENT = 4
"""Channels of each linear's inputs that are louder than the others,"""
LOUDER = 16.0
"""by this factor."""

METHODS: dict[str, dict[str, Any]] = {
    "nearest": {"method": "rtn"},
    "clip": {"scales": False, "rounding": "nearest"},
    "scales": {"clip": False, "rounding": "nearest"},
    "scales and clip": {"rounding": "nearest"},
    "feedback": {"scales": False, "clip": False},
    "feedback and clip": {"scales": False},
    "feedback and scales": {"clip": False},
    "default: all three": {},
    "high: and refinement": {"effort": "high"},
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, its merges learned from the builtin text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(builtin_documents(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def make_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """A Llama of four layers; its logits are spread as a trained model's, so that a first choice is one."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=HIDDEN_SIZE**-0.5,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            outputs = [layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.v_proj, layer.mlp.up_proj]
            for module in outputs:
                module.weight[torch.randperm(module.weight.shape[0])[:SALIENT]] *= LOUDER
        model.lm_head.weight *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(source: Path, out: Path, options: QuantizeOptions) -> dict[str, float]:
    """The mean of the linears' relative output errors on the calibration text, and what the whole model makes of other text."""
    report = quantize(str(source), out, options, progress=False)
    rows = evaluation_rows(SafetensorsSource(source), "builtin", options.sequence_length, 8192)
    result = evaluate(load_checkpoint(out), rows, load_checkpoint(source))
    assert result.kl_mean is not None and result.kl_percentile_99 is not None and result.top_1_agreement is not None
    return {
        "error": sum(layer["error"] for layer in report["layers"]) / len(report["layers"]),
        "kl_mean": result.kl_mean,
        "kl_percentile_99": result.kl_percentile_99,
        "top_1_agreement": result.top_1_agreement,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=3, help="random models to average over (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=28, help="calibration sequences (default: %(default)s)")
    arguments = parser.parse_args()
    plain = QuantizeOptions(group_size=64, samples=arguments.samples)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.models):
            source = Path(folder) / f"source-{seed}"
            make_model(source, tokenizer, seed)
            for index, (name, changes) in enumerate(METHODS.items()):
                out = Path(folder) / f"out-{seed}-{index}"
                found[name].append(measure(source, out, replace(plain, **changes)))
    means = {
        name: {key: sum(result[key] for result in results) / len(results) for key in results[0]}
        for name, results in found.items()
    }
    print("| | error of a linear | KL, mean | KL, 99th percentile | same first choice |\n|---|---|---|---|---|")
    for name, row in means.items():
        print(
            f"| {name} | {100 * row['error']:.3f} % | {row['kl_mean']:.4f} | {row['kl_percentile_99']:.3f} "
            f"| {100 * row['top_1_agreement']:.1f} % |"
        )
    print(json.dumps(means))


if __name__ == "__main__":
    main()
