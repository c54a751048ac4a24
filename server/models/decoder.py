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


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's prepared weights. Norms are fp32 [hidden]; q, k, v and gate, up are fused along their outputs."""

    input_norm: Tensor
    qkv: PreparedLinear
    qk_norm: QKNorm | None
    o: PreparedLinear
    post_attention_norm: Tensor
    gate_up: PreparedLinear
    down: PreparedLinear
    sliding_window: int | None

    @property
    def nbytes(self) -> int:
        return sum(linear.nbytes for linear in (self.qkv, self.o, self.gate_up, self.down))


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

    def forward(self, batch: ForwardBatch, kv: Sequence[KVCache], to_logits: bool = True) -> Tensor:
        """Logits, fp32 [batch.num_rows, vocabulary], of the rows that the batch selects; writes the batch's keys and values.
        Without `to_logits`: what the head would read, [batch.num_tokens, hidden], of every token."""
        backend, eps = self.backend, self.config.rms_norm_eps
        layers, head = self.weights.layers, self.weights.head if to_logits else None
        x = backend.embed(batch, self.weights.embedding)
        hidden, residual = backend.add_rms_norm(x, None, layers[0].input_norm, eps, for_linear=layers[0].qkv)
        for index, layer in enumerate(layers):
            is_last = index + 1 == len(layers)
            following = None if is_last else layers[index + 1]
            attended = self._attention(layer, hidden, batch, kv[index], for_linear=None if is_last else layer.o)
            if is_last and to_logits:  # from here on only the rows count whose logits are wanted
                attended, residual = backend.pick_rows(attended, residual, batch, for_linear=layer.o)
            x = backend.linear(attended, layer.o)
            hidden, residual = backend.add_rms_norm(
                x, residual, layer.post_attention_norm, eps, for_linear=layer.gate_up
            )
            x = self._mlp(layer, hidden)
            norm = following.input_norm if following else self.weights.final_norm
            hidden, residual = backend.add_rms_norm(
                x, residual, norm, eps, for_linear=following.qkv if following else head
            )
        return hidden.dense() if head is None else backend.logits(hidden, head)

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

    def _mlp(self, layer: DecoderLayer, hidden: LinearInput) -> Tensor:
        activation = cast(Activation, self.config.activation)
        gated = self.backend.gated_linear(hidden, layer.gate_up, activation, for_linear=layer.down)
        return self.backend.linear(gated, layer.down)
