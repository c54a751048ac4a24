"""A random AWQ checkpoint in the shape of a known model, to measure speed and memory where no weights can be had.

    python docs/compare/random_checkpoint.py llama-3.2-1b OUT --tokenizer models/smollm2-135m-instruct-awq

The tokenizer is only there for the server to start with: its vocabulary may be smaller than the model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    },
    # 2 of 8 experts compute a token: 0.9 billion of 3 billion parameters.
    "mixture-8x0.4b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 3584,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 32000,
        "rope_theta": 1000000.0,
    },
}


def quantized(name: str, out_features: int, in_features: int, group_size: int) -> dict[str, Tensor]:
    """One linear: random words, scales that keep activations near one."""

    def words(rows: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (rows, out_features // 8), dtype=torch.int64).to(torch.int32)

    groups = in_features // group_size
    scales = (0.5 + torch.rand(groups, out_features)) * 0.2 / in_features**0.5
    return {f"{name}.qweight": words(in_features), f"{name}.qzeros": words(groups), f"{name}.scales": scales.half()}


def mlp(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's MLP's linears, in 4 bit."""
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    modules = {"mlp.gate_proj": False, "mlp.up_proj": False, "mlp.down_proj": True}
    if "num_local_experts" in shape:
        experts = [f"block_sparse_moe.experts.{index}" for index in range(shape["num_local_experts"])]
        modules = {f"{expert}.{name}": name == "w2" for expert in experts for name in ("w1", "w2", "w3")}
    return {name: (hidden, intermediate) if down else (intermediate, hidden) for name, down in modules.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint folder to take the tokenizer from")
    parser.add_argument("--group-size", type=int, default=128)
    options = parser.parse_args()
    shape, size = SHAPES[options.shape], options.group_size
    torch.manual_seed(0)
    options.out.mkdir(parents=True)
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head_dim, shape["num_key_value_heads"] * head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        **mlp(shape),
    }
    tensors = {
        "model.embed_tokens.weight": torch.randn(shape["vocab_size"], hidden).mul_(0.02).half(),
        "model.norm.weight": torch.ones(hidden).half(),
    }
    for index in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        for name, (rows, columns) in linears.items():
            tensors |= quantized(f"{prefix}.{name}", rows, columns, size)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = torch.ones(hidden).half()
        if "num_local_experts" in shape:
            router = torch.randn(shape["num_local_experts"], hidden) / hidden**0.5
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = router.half()
    save_file(tensors, options.out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "quantization_config": {
            "quant_method": "awq",
            "bits": 4,
            "group_size": size,
            "zero_point": True,
            "version": "gemm",
        },
        **shape,
    }
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(options.tokenizer / name, options.out / name)


if __name__ == "__main__":
    main()
