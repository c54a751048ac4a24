"""Every architecture through both halves: the same list in each, and for each a tiny model quantized, served and held against
transformers, the reference and the bitwise laws."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.backend import BackendOptions
from kernels.choice import create_backend
from quantizer.config import FORMATS, QuantizeOptions
from quantizer.evaluate import load_checkpoint
from quantizer.mappings import ARCHITECTURES as MAPPINGS
from quantizer.mappings import WRAPPERS as QUANTIZED_WRAPPERS
from quantizer.run import quantize
from quantizer.sources import SafetensorsSource, check_tensors
from server.architectures import ARCHITECTURES, WRAPPERS
from tests.awq_checkpoints import make_awq_checkpoint
from tests.kernels.cpu_support import needs_native
from tests.server.engine.test_load_independence import builder, check_law, mixed_requests, run
from tests.server.models.test_decoder import Served, assert_close_logits, random_tokens
from tests.tiny_models import MIXTURES, TINY_MODELS, add_tokenizer, make_tiny_model, reference_logits


def test_what_is_quantized_is_served_and_the_reverse() -> None:
    assert {mapping.model_type for mapping in MAPPINGS.values()} == set(ARCHITECTURES)
    assert QUANTIZED_WRAPPERS.keys() == WRAPPERS.keys()
    for name, wrapper in WRAPPERS.items():
        other = QUANTIZED_WRAPPERS[name]
        assert MAPPINGS[other.architecture].model_type == wrapper.model_type
        assert (other.prefixes, other.ignored) == (wrapper.prefixes, wrapper.ignored)


def test_the_page_says_what_the_tables_say() -> None:
    script = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "supported_models.py"))
    page = script["PAGE"].read_text()
    assert script["written"](page) == page, "make models-page"
    assert script["written"](page.replace("`olmo2`", "`olmo7`")) == page


def wrap(source: Path, out: Path, begin: str) -> Path:
    """A text model as the decoder of one that also sees. begin: of its tensor names."""
    out.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, out)
    config = json.loads((source / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    (out / "config.json").write_text(json.dumps({**outer, "text_config": config, "vision_config": {}}))
    tensors = load_file(source / "model.safetensors")
    stored = {name.replace("model.", begin, 1): tensor for name, tensor in tensors.items()}
    vision = {begin.split("language_model.")[0] + "vision_tower.embeddings.weight": torch.ones(2)}
    save_file({**stored, **vision}, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("begin", ["language_model.model.", "model.language_model."])
def test_gemma_3_that_sees_is_served_and_quantized_as_text(begin: str, tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "text", "gemma3_text", num_hidden_layers=2, layer_types=None)
    add_tokenizer(source)
    wrapped, tokens = wrap(source, tmp_path / "wrapped", begin), random_tokens(30)
    served = Served(wrapped)
    assert served.config.eos_token_ids == (2,)  # generation_config.json's
    assert torch.equal(served.logits(tokens, [30]), Served(source).logits(tokens, [30]))
    opened = SafetensorsSource(wrapped)
    assert check_tensors(opened) == check_tensors(SafetensorsSource(source))
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "config.json").write_text(json.dumps(opened.config_json))
    save_file({name: opened.load(name) for name in opened.names()}, tmp_path / "written" / "model.safetensors")
    assert torch.equal(Served(tmp_path / "written").logits(tokens, [30]), served.logits(tokens, [30]))


def test_every_architecture_has_a_tiny_model() -> None:
    assert {kind.split("-")[0] for kind in TINY_MODELS} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize("layout", FORMATS)
def test_quantized_and_served(kind: str, layout: str, tmp_path: Path) -> None:
    """What the server computes of a quantized checkpoint is what transformers computes of its dequantized weights, also when it is
    loaded again."""
    source, out = make_tiny_model(tmp_path / "source", kind), tmp_path / "out"
    add_tokenizer(source)
    # Otherwise transformers goes by the model type, and Gemma's tokenizer wants tokens that this one lacks.
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    options = QuantizeOptions(group_size=32, samples=4, sequence_length=64, format=layout)
    quantize(str(source), out, options, progress=False)
    tokens = random_tokens(80)
    expected = reference_logits(load_checkpoint(out), tokens)
    first = Served(out).logits(tokens, [80])
    assert_close_logits(first, expected)
    assert torch.equal(Served(out).logits(tokens, [79, 1]), first)


@pytest.fixture
def awq(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        make_tiny_model(tmp_path / "source", kind, initializer_range=0.1)
        make_awq_checkpoint(tmp_path / "source", tmp_path / "awq", tmp_path / "dense", 32)
        add_tokenizer(tmp_path / "awq")
        return tmp_path / "awq"

    return make


@needs_native
@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize(("activations", "largest_kl", "largest_error"), [("int8", 1e-2, 0.2), ("int16", 3e-5, 0.02)])
def test_the_cpu_back_end_is_close_to_the_reference(
    kind: str, activations: str, largest_kl: float, largest_error: float, awq: Callable[[str], Path]
) -> None:
    """Teacher-forced. The error is the largest of a logit, relative to the largest logit; of a mixture's tokens, 19 of 20: rounding
    may choose another expert where two are as good."""
    directory, tokens = awq(kind), random_tokens(90)
    backend = create_backend("cpu", BackendOptions(num_threads=1, cpu_activations=activations, lm_head_dtype="fp16"))
    expected = Served(directory).logits(tokens, [90]).double()
    got = Served(directory, backend=backend).logits(tokens, [50, 1, 39]).double()
    assert 0 < mean_kl(expected, got) < largest_kl
    errors = (got - expected).abs().amax(-1) / expected.abs().max()
    assert errors.quantile(0.95 if kind in MIXTURES else 1.0) < largest_error


def mean_kl(expected: Tensor, got: Tensor) -> float:
    p, q = expected.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bits_do_not_depend_on_the_load(kind: str, backend: str, awq: Callable[[str], Path]) -> None:
    directory = awq(kind)
    requests = mixed_requests(directory, 12, 120)
    try:
        check_law(builder(directory, backend, 2, 120), requests)
        if backend == "cpu":
            two, one = (run(builder(directory, "cpu", threads, 120)(), requests) for threads in (2, 1))
            assert two.tokens == one.tokens and two.logits == one.logits
    finally:
        torch.set_num_threads(1)
