"""The decoder: one class for every architecture, which differ by the flags of `ModelConfig` and by which weights they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from kernels.backend import (
    Activation,
    AttentionShape,
    Backend,
    KVCache,
    LinearInput,
    PreparedEmbedding,
    PreparedLinear,
    QKNorm,
    RotaryTable,
)
from kernels.batch import ForwardBatch
from server.model_config import ModelConfig
from server.models.mlp import Mlp


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's prepared weights. Norms are fp32 [hidden]; q, k, v are fused along their outputs."""

    input_norm: Tensor
    qkv: PreparedLinear
    qk_norm: QKNorm | None
    o: PreparedLinear
    post_attention_norm: Tensor
    mlp: Mlp
    sliding_window: int | None

    @property
    def nbytes(self) -> int:
        return self.qkv.nbytes + self.o.nbytes + self.mlp.nbytes


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All of a model, prepared by one back end."""

    embedding: PreparedEmbedding
    layers: Sequence[DecoderLayer]
    final_norm: Tensor
    head: PreparedLinear

    @property
    def nbytes(self) -> int:
        return self.embedding.nbytes + self.head.nbytes + sum(layer.nbytes for layer in self.layers)


class Decoder:
    """A pre-norm transformer decoder over a back end's ops."""

    def __init__(self, config: ModelConfig, backend: Backend, weights: DecoderWeights, rotary: RotaryTable) -> None:
        self.config = config
        self.backend = backend
        self.weights = weights
        self.rotary = rotary
        self.attention_shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self.attention_scale = config.head_dim**-0.5
        self.activation = cast(Activation, config.activation)

    def forward(self, batch: ForwardBatch, kv: Sequence[KVCache]) -> Tensor:
        """Logits, fp32 [batch.num_rows, vocabulary], of the rows that the batch selects; writes the batch's keys and values."""
        backend, eps = self.backend, self.config.rms_norm_eps
        layers = self.weights.layers
        x = backend.embed(batch, self.weights.embedding)
        hidden, residual = backend.add_rms_norm(x, None, layers[0].input_norm, eps, for_linear=layers[0].qkv)
        for index, layer in enumerate(layers):
            is_last = index + 1 == len(layers)
            following = None if is_last else layers[index + 1]
            attended = self._attention(layer, hidden, batch, kv[index], for_linear=None if is_last else layer.o)
            if is_last:  # from here on only the rows count whose logits are wanted
                attended, residual = backend.pick_rows(attended, residual, batch, for_linear=layer.o)
            x = backend.linear(attended, layer.o)
            hidden, residual = backend.add_rms_norm(
                x, residual, layer.post_attention_norm, eps, for_linear=layer.mlp.reader
            )
            x = layer.mlp.forward(backend, hidden, self.activation)
            norm = following.input_norm if following else self.weights.final_norm
            hidden, residual = backend.add_rms_norm(
                x, residual, norm, eps, for_linear=following.qkv if following else self.weights.head
            )
        return backend.logits(hidden, self.weights.head)

    def _attention(
        self,
        layer: DecoderLayer,
        hidden: LinearInput,
        batch: ForwardBatch,
        kv: KVCache,
        for_linear: PreparedLinear | None,
    ) -> LinearInput:
        backend, shape = self.backend, self.attention_shape
        qkv = backend.linear(hidden, layer.qkv)
        q = backend.rope_and_store(qkv, shape, layer.qk_norm, self.rotary, batch, kv)
        return backend.attention(
            q, shape, kv, batch, self.attention_scale, window=layer.sliding_window, for_linear=for_linear
        )
