"""From checkpoint to prepared weights: which tensors a decoder has, checked by their headers first, then read layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import Backend, PreparedLinear, QKNorm
from kernels.format import AwqWeight, DenseWeight
from server.model_config import ModelConfig, ModelError
from server.models.checkpoint import Checkpoint
from server.models.decoder import Decoder, DecoderLayer, DecoderWeights
from server.models.formats import check_module, is_quantized, read_module
from server.models.mixture import mixture_linears, prepare_mixture
from server.models.mlp import DenseMlp, MixtureMlp, Mlp
from server.models.rotary import rotary_table

FLOAT_DTYPES = ("F16", "BF16", "F32")

FUSED_LINEARS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
}
DENSE_MLP: Mapping[str, tuple[str, ...]] = {
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Which of a layer's modules are computed as one linear, in the order of their outputs."""

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# Tensors that checkpoints carry and that mean nothing to us: frequencies are computed from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def load_decoder(model_dir: Path, config: ModelConfig, backend: Backend, max_model_len: int) -> Decoder:
    """Checks the whole checkpoint by its headers, then prepares one layer at a time.

    Raises ModelError or FormatError naming file, tensor, expected and found.
    """
    checkpoint = Checkpoint(model_dir)
    check_tensors(checkpoint, config)
    reader = _Reader(checkpoint, config, backend)
    with torch.inference_mode():
        embedding = DenseWeight(EMBEDDING, checkpoint.read(f"{EMBEDDING}.weight"))
        head: AwqWeight | DenseWeight = embedding
        if not config.tie_word_embeddings or is_quantized(checkpoint, HEAD):
            head = reader.weight(HEAD)
        weights = DecoderWeights(
            embedding=backend.prepare_embedding(embedding),
            layers=[reader.layer(index) for index in range(config.num_layers)],
            final_norm=backend.prepare_norm(checkpoint.read(f"{FINAL_NORM}.weight")),
            head=backend.prepare_head(head),
        )
        rotary = backend.prepare_rotary(*rotary_table(config, max_model_len))
    checkpoint.close()
    return Decoder(config, backend, weights, rotary)


class _Reader:
    """Reads modules and hands them to the back end."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, backend: Backend) -> None:
        self.checkpoint, self.config, self.backend = checkpoint, config, backend

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        linears = self.fused(prefix, FUSED_LINEARS)
        norms = [self.norm(f"{prefix}.{name}") for name in _LAYER_NORMS]
        qk_norm = None
        if self.config.qk_norm:
            q_weight, k_weight = (self.norm(f"{prefix}.{name}") for name in _QK_NORMS)
            qk_norm = QKNorm(q_weight, k_weight, self.config.rms_norm_eps)
        return DecoderLayer(
            input_norm=norms[0],
            post_attention_norm=norms[1],
            qk_norm=qk_norm,
            sliding_window=self.config.sliding_windows[index],
            mlp=self.mlp(prefix, index),
            **linears,
        )

    def fused(self, prefix: str, roles: Mapping[str, tuple[str, ...]]) -> dict[str, PreparedLinear]:
        return {role: self.linear([f"{prefix}.{module}" for module in modules]) for role, modules in roles.items()}

    def mlp(self, prefix: str, index: int) -> Mlp:
        mixture = self.config.mixture
        if mixture is not None and index in mixture.layers:
            return MixtureMlp(prepare_mixture(self.backend, mixture, prefix, self.weight))
        return DenseMlp(**self.fused(prefix, DENSE_MLP))

    def norm(self, name: str) -> Tensor:
        return self.backend.prepare_norm(self.checkpoint.read(f"{name}.weight"))

    def linear(self, modules: Sequence[str]) -> PreparedLinear:
        weights = [self.weight(module) for module in modules]
        has_bias = [f"{module}.bias" in self.checkpoint for module in modules]
        bias = None
        if any(has_bias):
            bias = torch.cat(
                [
                    self.checkpoint.read(f"{module}.bias").float() if present else torch.zeros(weight.out_features)
                    for module, weight, present in zip(modules, weights, has_bias, strict=True)
                ]
            )
        return self.backend.prepare_linear(weights, bias)

    def weight(self, module: str) -> AwqWeight | DenseWeight:
        if is_quantized(self.checkpoint, module):
            assert self.config.quantization is not None
            return read_module(self.checkpoint, self.config.quantization, module)
        return DenseWeight(module, self.checkpoint.read(f"{module}.weight"))


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Every tensor the decoder needs is there with the right shape and dtype, and none is left over. Reads headers only."""
    expected: set[str] = set()

    def dense(name: str, shape: tuple[int, ...]) -> None:
        checkpoint.expect(name, shape, FLOAT_DTYPES)
        expected.add(name)

    def linear(module: str, out_features: int, in_features: int, bias: bool) -> None:
        if is_quantized(checkpoint, module):
            expected.update(check_module(checkpoint, config.quantization, module, out_features, in_features))
        else:
            dense(f"{module}.weight", (out_features, in_features))
        if bias or f"{module}.bias" in checkpoint:
            dense(f"{module}.bias", (out_features,))

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    dense(f"{EMBEDDING}.weight", (config.vocab_size, hidden))
    dense(f"{FINAL_NORM}.weight", (hidden,))
    if not config.tie_word_embeddings or is_quantized(checkpoint, HEAD):
        linear(HEAD, config.vocab_size, hidden, bias=False)
    else:
        expected.add(f"{HEAD}.weight")  # some tied checkpoints carry the copy
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        for norm in _LAYER_NORMS:
            dense(f"{prefix}.{norm}.weight", (hidden,))
        for norm in _QK_NORMS if config.qk_norm else ():
            dense(f"{prefix}.{norm}.weight", (config.head_dim,))
        linear(f"{prefix}.self_attn.q_proj", q_size, hidden, config.qkv_bias)
        linear(f"{prefix}.self_attn.k_proj", kv_size, hidden, config.qkv_bias)
        linear(f"{prefix}.self_attn.v_proj", kv_size, hidden, config.qkv_bias)
        linear(f"{prefix}.self_attn.o_proj", hidden, q_size, config.o_bias)
        if config.mixture is not None and index in config.mixture.layers:
            for module, (out_features, in_features) in mixture_linears(config.mixture, prefix, hidden).items():
                linear(module, out_features, in_features, bias=False)
            continue
        linear(f"{prefix}.mlp.gate_proj", inner, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.up_proj", inner, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, config.mlp_bias)
    surplus = sorted(name for name in checkpoint.tensors.keys() - expected if not name.endswith(_IGNORED_SUFFIXES))
    if surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        raise ModelError(
            f"{checkpoint.tensors[surplus[0]].file}: a {config.model_type} model has no tensor "
            f"{', '.join(surplus[:3])}{more}; is config.json of another model?"
        )
