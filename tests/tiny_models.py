"""Tiny random checkpoints of every supported architecture, made by transformers, and what transformers answers with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kernels.format import AWQ_TENSORS, AwqWeight

_COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Far larger than real models': small random ones repeat themselves otherwise, and then prove nothing.
    "initializer_range": 0.25,
}

TINY_MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-untied-biased": (
        transformers.LlamaConfig,
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": 20, "tie_word_embeddings": False}),
    "qwen2": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": (
        transformers.MixtralConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20, "tie_word_embeddings": False},
    ),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2": (
        transformers.Gemma2Config,
        {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20, "final_logit_softcapping": 5.0}
        | {"attn_logit_softcapping": 2.0},
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": (
        transformers.Phi3Config,
        {
            "tie_word_embeddings": False,
            "sliding_window": 40,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],
                "long_factor": [2.0 + 0.5 * i for i in range(6)],
            },
        },
    ),
    "granite": (
        transformers.GraniteConfig,
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "olmo2": (transformers.Olmo2Config, {"tie_word_embeddings": False}),
    "glm4": (transformers.Glm4Config, {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": False}),
    "smollm3": (transformers.SmolLM3Config, {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
}

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


_QUICK = ("llama-untied-biased", "gemma3_text", "phi3")


def kinds_by_cost() -> list[Any]:
    """Every kind as a test's parameter; in `make test` those alone that between them have everything that architectures differ
    by."""
    return [pytest.param(kind, marks=() if kind in _QUICK else pytest.mark.slow) for kind in TINY_MODELS]


def make_tiny_model(
    directory: Path, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Writes a checkpoint of `kind` (a key of TINY_MODELS) with random weights, biases and norms included."""
    config_class, options = TINY_MODELS[kind]
    max_shard_size = overrides.pop("max_shard_size", "5GB")
    config = config_class(**{**_COMMON, **options, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def load_reference(directory: Path) -> torch.nn.Module:
    """The checkpoint in transformers, fp32, eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def layer_tensors(directory: Path, index: int) -> dict[str, torch.Tensor]:
    """A layer's tensors as an unsharded checkpoint has them, under names relative to the layer."""
    prefix = f"model.layers.{index}."
    tensors = load_file(directory / "model.safetensors")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0].float()


@torch.no_grad()
def reference_greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation, the whole sequence computed anew at each step: no cache to be wrong."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def cached_greedy(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation with transformers' own KV cache, past the end-of-sequence token."""
    result = model(torch.tensor([prompt]), use_cache=True)
    tokens: list[int] = []
    while True:
        tokens.append(int(result.logits[0, -1].argmax()))
        if len(tokens) == num_tokens:
            return tokens
        result = model(torch.tensor([tokens[-1:]]), past_key_values=result.past_key_values, use_cache=True)


def add_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 320 tokens, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 4, "this is that and there it is"], trainer
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def dequantized_model(directory: Path) -> torch.nn.Module:
    """An AWQ checkpoint as a plain fp32 transformers model, its weights dequantized here."""
    config = transformers.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    group_size = json.loads((directory / "config.json").read_text())["quantization_config"]["group_size"]
    tensors = {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}
    dense = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = {key: tensors[f"{module}.{key}"] for key in AWQ_TENSORS}
            dense[f"{module}.weight"] = AwqWeight.from_tensors(module, parts, group_size).dequantize()
        elif kind not in AWQ_TENSORS:
            dense[name] = tensor.float()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dense, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()
