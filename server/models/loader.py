"""From checkpoint to prepared weights: which tensors a decoder has, checked by their headers first, then read layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import Backend, PreparedLinear, QKNorm, RotaryTable
from kernels.format import AwqWeight, DenseWeight
from server.model_config import ModelConfig, ModelError
from server.models.checkpoint import Checkpoint
from server.models.decoder import Decoder, DecoderLayer, DecoderWeights
from server.models.formats import check_module, is_quantized, read_module
from server.models.mixture import mixture_linears, prepare_mixture
from server.models.mlp import DenseMlp, MixtureMlp, Mlp
from server.models.rotary import rotary_table

logger = logging.getLogger(__name__)

FLOAT_DTYPES = ("F16", "BF16", "F32")

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
_O = "self_attn.o_proj"
_DOWN = "mlp.down_proj"
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# Tensors that checkpoints carry and that mean nothing to us: frequencies are computed from the config.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def load_decoder(model_dir: Path, config: ModelConfig, backend: Backend, max_model_len: int) -> Decoder:
    """Checks the whole checkpoint by its headers, then prepares one layer at a time.

    Raises ModelError or FormatError naming file, tensor, expected and found.
    """
    checkpoint = Checkpoint(model_dir, config.wrapper.rename) if config.wrapper else Checkpoint(model_dir)
    if config.wrapper and checkpoint.ignored:
        logger.info("%s is not served: %d tensors are passed over", config.wrapper.ignored_as, checkpoint.ignored)
    check_tensors(checkpoint, config)
    with torch.inference_mode():
        reader = _Reader(checkpoint, config, backend, max_model_len)
        embedding = DenseWeight(EMBEDDING, checkpoint.read(f"{EMBEDDING}.weight"))
        head: AwqWeight | DenseWeight = embedding
        if not config.tie_word_embeddings or is_quantized(checkpoint, HEAD):
            head = reader.weight(HEAD)
        weights = DecoderWeights(
            embedding=backend.prepare_embedding(embedding),
            layers=[reader.layer(index) for index in range(config.num_layers)],
            final_norm=reader.final_norm(),
            head=backend.prepare_head(head),
        )
    checkpoint.close()
    return Decoder(config, backend, weights)


class _Reader:
    """Reads modules and hands them to the back end."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, backend: Backend, max_model_len: int) -> None:
        self.checkpoint, self.config, self.backend = checkpoint, config, backend
        ropes = {id(rope): rope for rope in config.layer_ropes if rope is not None}
        self.halves = _halves(config) if config.architecture.interleaved_rope else None
        self.rotary: dict[int, RotaryTable] = {
            key: backend.prepare_rotary(*rotary_table(rope, config.max_position_embeddings, max_model_len))
            for key, rope in ropes.items()
        }

    def layer(self, index: int) -> DecoderLayer:
        prefix, architecture = f"model.layers.{index}", self.config.architecture
        norms, rope = architecture.norms, self.config.layer_ropes[index]

        def linear(*modules: str) -> PreparedLinear:
            return self.linear([f"{prefix}.{module}" for module in modules])

        def norm(name: str | None) -> Tensor | None:
            return None if name is None else self.norm(f"{prefix}.{name}")

        qk_norm = None
        if architecture.qk_norm != "none":
            q_weight, k_weight = (self.norm(f"{prefix}.{name}") for name in _QK_NORMS)
            qk_norm = QKNorm(q_weight, k_weight, self.config.rms_norm_eps, architecture.unit_offset_norms)
        return DecoderLayer(
            input_norm=norm(norms.input),
            qkv=self.linear([f"{prefix}.{module}" for module in architecture.qkv], self.halves),
            qk_norm=qk_norm,
            o=linear(_O),
            attention_output_norm=norm(norms.attention_output),
            mlp_input_norm=norm(norms.mlp_input),
            mlp=self.mlp(prefix, index),
            mlp_output_norm=norm(norms.mlp_output),
            sliding_window=self.config.sliding_windows[index],
            rotary=self.rotary[id(rope)] if rope is not None else None,
        )

    def mlp(self, prefix: str, index: int) -> Mlp:
        mixture = self.config.mixture
        if mixture is not None and index in mixture.layers:
            return MixtureMlp(prepare_mixture(self.backend, mixture, prefix, self.weight))
        gate_up = self.linear([f"{prefix}.{module}" for module in self.config.architecture.gate_up])
        return DenseMlp(gate_up, self.linear([f"{prefix}.{_DOWN}"]))

    def norm(self, name: str) -> Tensor:
        return self.backend.prepare_norm(self.checkpoint.read(f"{name}.weight"))

    def final_norm(self) -> Tensor:
        """The last norm's weight, which takes the scale of the logits in: nothing but the head reads it."""
        weight = self.checkpoint.read(f"{FINAL_NORM}.weight").float()
        offset = 1.0 if self.config.architecture.unit_offset_norms else 0.0
        return self.backend.prepare_norm((weight + offset) * self.config.scales.logits - offset)

    def linear(self, modules: Sequence[str], order: Tensor | None = None) -> PreparedLinear:
        """order: of the outputs of all the modules, none of which leaves its own."""
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
        if order is not None:
            starts = accumulate((weight.out_features for weight in weights), initial=0)
            weights = [
                weight.select_outputs(order[start : start + weight.out_features] - start)
                for weight, start in zip(weights, starts, strict=False)
            ]
            bias = bias[order] if bias is not None else None
        return self.backend.prepare_linear(weights, bias)

    def weight(self, module: str) -> AwqWeight | DenseWeight:
        if is_quantized(self.checkpoint, module):
            assert self.config.quantization is not None
            return read_module(self.checkpoint, self.config.quantization, module)
        return DenseWeight(module, self.checkpoint.read(f"{module}.weight"))


def _halves(config: ModelConfig) -> Tensor:
    """The order of q, k and v rows in which channels that rotate together are half the rotary size apart, as back ends have them,
    for a checkpoint that has them side by side. Scores do not change: queries and keys are permuted alike."""
    size, rotary_dim = config.head_dim, config.rope.rotary_dim
    rotated, rest = torch.arange(rotary_dim), torch.arange(rotary_dim, size)
    head = torch.cat((rotated[0::2], rotated[1::2], rest))
    num_rotating = config.num_heads + config.num_kv_heads
    heads = torch.arange(num_rotating)[:, None] * size + head
    values = torch.arange(num_rotating * size, (num_rotating + config.num_kv_heads) * size)
    return torch.cat((heads.flatten(), values))


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

    def fused(prefix: str, modules: Sequence[str], sizes: Sequence[int], bias: bool) -> None:
        """Modules of one linear: one for each of the sizes, or one for all."""
        for module, size in zip(modules, sizes if len(modules) > 1 else [sum(sizes)], strict=True):
            linear(f"{prefix}.{module}", size, hidden, bias)

    hidden, inner, architecture = config.hidden_size, config.intermediate_size, config.architecture
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qk_widths = (q_size, kv_size) if architecture.qk_norm == "all heads" else (config.head_dim, config.head_dim)
    dense(f"{EMBEDDING}.weight", (config.vocab_size, hidden))
    dense(f"{FINAL_NORM}.weight", (hidden,))
    if not config.tie_word_embeddings or is_quantized(checkpoint, HEAD):
        linear(HEAD, config.vocab_size, hidden, bias=False)
    else:
        expected.add(f"{HEAD}.weight")  # some tied checkpoints carry the copy
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}"
        for norm in architecture.norms.names():
            dense(f"{prefix}.{norm}.weight", (hidden,))
        for norm, width in zip(_QK_NORMS, qk_widths, strict=True) if architecture.qk_norm != "none" else ():
            dense(f"{prefix}.{norm}.weight", (width,))
        fused(prefix, architecture.qkv, (q_size, kv_size, kv_size), config.qkv_bias)
        linear(f"{prefix}.{_O}", hidden, q_size, config.o_bias)
        if config.mixture is not None and index in config.mixture.layers:
            for module, (out_features, in_features) in mixture_linears(config.mixture, prefix, hidden).items():
                linear(module, out_features, in_features, bias=False)
            continue
        fused(prefix, architecture.gate_up, (inner, inner), config.mlp_bias)
        linear(f"{prefix}.{_DOWN}", hidden, inner, config.mlp_bias)
    surplus = sorted(name for name in checkpoint.tensors.keys() - expected if not name.endswith(_IGNORED_SUFFIXES))
    if surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        raise ModelError(
            f"{checkpoint.tensors[surplus[0]].file}: a {config.model_type} model has no tensor "
            f"{', '.join(surplus[:3])}{more}; is config.json of another model?"
        )
