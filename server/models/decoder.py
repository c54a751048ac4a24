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
    """One layer's prepared weights. Norms are fp32 [hidden], None where the architecture has none there; q, k, v are fused along
    their outputs."""

    input_norm: Tensor | None
    qkv: PreparedLinear
    qk_norm: QKNorm | None
    o: PreparedLinear
    attention_output_norm: Tensor | None
    mlp_input_norm: Tensor | None
    mlp: Mlp
    mlp_output_norm: Tensor | None
    sliding_window: int | None
    rotary: RotaryTable | None

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
    """A transformer decoder over a back end's ops.

    A residual multiplier m costs nothing: the stream that is kept is the true one divided by m. Then a sublayer's output is added
    as it is, embeddings are scaled by 1/m more, and a norm of the stream gives what it must with its epsilon divided by m squared.
    """

    def __init__(self, config: ModelConfig, backend: Backend, weights: DecoderWeights) -> None:
        self.config = config
        self.backend = backend
        self.weights = weights
        self.attention_shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim)
        self.activation = cast(Activation, config.activation)
        self.unit_offset = config.architecture.unit_offset_norms
        self.embedding_scale = config.scales.embedding / config.scales.residual
        self.norm_eps = config.rms_norm_eps / config.scales.residual**2

    def forward(self, batch: ForwardBatch, kv: Sequence[KVCache], to_logits: bool = True) -> Tensor:
        """Logits, fp32 [batch.num_rows, vocabulary], of the rows that the batch selects; writes the batch's keys and values.
        Without `to_logits`: what the head would read, [batch.num_tokens, hidden], of every token."""
        backend, layers = self.backend, self.weights.layers
        head = self.weights.head if to_logits else None
        x = backend.embed(batch, self.weights.embedding, self.embedding_scale)
        hidden, residual = self._add_norm(x, None, None, layers[0].input_norm, layers[0].qkv)
        for index, layer in enumerate(layers):
            is_last = index + 1 == len(layers)
            following = None if is_last else layers[index + 1]
            attended = self._attention(layer, hidden, batch, kv[index], for_linear=None if is_last else layer.o)
            if is_last and to_logits:  # from here on only the rows count whose logits are wanted
                attended, residual = backend.pick_rows(attended, residual, batch, for_linear=layer.o)
            x = backend.linear(attended, layer.o)
            hidden, residual = self._add_norm(
                x, residual, layer.attention_output_norm, layer.mlp_input_norm, layer.mlp.reader
            )
            x = layer.mlp.forward(backend, hidden, self.activation)
            norm = following.input_norm if following else self.weights.final_norm
            reader = following.qkv if following else head
            hidden, residual = self._add_norm(x, residual, layer.mlp_output_norm, norm, reader)
        if head is None:
            return hidden.dense()
        return backend.logits(hidden, head, self.config.scales.logits_soft_cap)

    def _add_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        x_norm: Tensor | None,
        norm: Tensor | None,
        reader: PreparedLinear | None,
    ) -> tuple[LinearInput, Tensor]:
        """What `reader` reads, and the residual stream, once x (or its norm) is added to it."""
        return self.backend.add_rms_norm(x, residual, norm, self.norm_eps, self.unit_offset, reader, x_norm)

    def _attention(
        self,
        layer: DecoderLayer,
        hidden: LinearInput,
        batch: ForwardBatch,
        kv: KVCache,
        for_linear: PreparedLinear | None,
    ) -> LinearInput:
        backend, shape, scales = self.backend, self.attention_shape, self.config.scales
        qkv = backend.linear(hidden, layer.qkv)
        q = backend.rope_and_store(qkv, shape, layer.qk_norm, layer.rotary, batch, kv)
        return backend.attention(
            q,
            shape,
            kv,
            batch,
            scales.attention,
            layer.sliding_window,
            scales.attention_soft_cap,
            for_linear=for_linear,
        )
