"""The `awq-serve` command: where options come from, and what is said of wrong ones before anything heavy happens."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import __main__ as command
from server.api.context import SamplingDefaults
from server.config import EngineConfig, NgramSpeculation, ServerConfig
from server.model_files import (
    ModelFilesError,
    ensure_tokenizer_file,
    load_sampling_defaults,
    resolve_model,
    served_name,
)
from server.options import OPTIONS, parse_options
from server.text import Tokenizer
from tests.server.fakes import END, byte_level_tokenizer


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], environment: dict[str, str]) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_options(arguments, environment)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_defaults_are_the_configurations() -> None:
    assert parse_options(["some/model"], {}) == ServerConfig(EngineConfig("some/model"))


def test_a_flag_goes_before_the_environment_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model: from-file\nport: 1\nmax-num-seqs: 1\nmax_model_len: 4k\nenable-prefix-caching: false\n")
    environment = {"AWQSERVE_CONFIG": str(file), "AWQSERVE_PORT": "2", "AWQSERVE_MAX_NUM_SEQS": "2", "HOME": "/"}
    config = parse_options(["--port", "3"], environment)
    assert (config.port, config.engine.max_num_seqs, config.engine.max_model_len) == (3, 2, 4000)
    assert (config.engine.model, config.engine.enable_prefix_caching) == ("from-file", False)
    config = parse_options(["mine", "--enable-prefix-caching"], environment | {"AWQSERVE_MODEL": "theirs"})
    assert (config.engine.model, config.engine.enable_prefix_caching) == ("mine", True)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_option_comes_from_every_source(option, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    samples = {
        "device": "cpu",
        "dtype": "bfloat16",
        "kernel-backend": "reference",
        "log-level": "debug",
        "memory-utilization": "0.5",
        "drain-timeout": "3",
        "cpu-activations": "int16",
        "lm-head-dtype": "fp16",
        "kv-cache-dtype": "int8",
        "tool-call-parser": "mistral",
        "scheduling-policy": "priority",
        "reasoning-parser": "think",
        "log-format": "json",
        "metrics-prefix": "vllm:",
        "otlp-traces-endpoint": "http://collector:4318/v1/traces",
        "speculative": "ngram:4:2-5",
    }
    text = samples.get(option.name, "true" if option.is_flag else "16")
    if option.is_flag and option.default:
        text = "false"
    spelled = (
        [f"--{option.name}"]
        if text == "true"
        else [f"--no-{option.name}"]
        if option.is_flag
        else [f"--{option.name}", text]
    )
    arguments = [text] if option.name == "model" else ["16", *spelled]
    file = tmp_path / "server.yaml"
    file.write_text(
        f"model: '16'\n{option.name.replace('-', '_')}: {json.dumps(text) if not option.is_flag else text}\n"
    )
    by_flag = parse_options(arguments, {})
    variable = "AWQSERVE_" + option.name.upper().replace("-", "_")
    assert (
        by_flag
        == parse_options([], {"AWQSERVE_MODEL": "16", variable: text})
        == parse_options(["--config", str(file)], {})
    )
    assert by_flag != ServerConfig(EngineConfig("16")) or option.name == "model" or option.default == 16


def test_speculation() -> None:
    for text, expected in (
        ("none", None),
        ("ngram:5", NgramSpeculation(5)),
        ("ngram:8:1-3", NgramSpeculation(8, 1, 3)),
    ):
        assert parse_options(["m", "--speculative", text], {}).engine.speculative == expected


def test_lists_and_sizes() -> None:
    config = parse_options(["m", "--served-model-name", "a", "b", "--kv-cache-memory-bytes", "1.5G"], {})
    assert (config.served_model_names, config.engine.kv_cache_memory_bytes) == (("a", "b"), 3 * 2**29)
    assert parse_options(["m"], {"AWQSERVE_SERVED_MODEL_NAME": "a, b"}).served_model_names == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        ([], {}, ["MODEL is missing"]),
        (["m", "--port", "x"], {}, ["--port", "'x'", "whole number"]),
        (["m", "--speculative", "medusa"], {}, ["--speculative", "'medusa'", "ngram:N:MIN-MAX"]),
        (["m", "--speculative", "ngram:33"], {}, ["--speculative", "33", "1..32"]),
        (["m", "--speculative", "ngram:4:3-2"], {}, ["--speculative", "3-2", "1..16"]),
        (["m", "--port", "70000"], {}, ["--port", "70000", "0..65535"]),
        (["m", "--max-num-seqs", "0"], {}, ["--max-num-seqs", "0 is less than 1"]),
        (["m", "--max-model-len", "8kb"], {}, ["--max-model-len", "'8kb'"]),
        (["m", "--kernel-backend", "tpu"], {}, ["--kernel-backend", "'tpu'", "reference"]),
        (["m", "--memory-utilization", "1.5"], {}, ["--memory-utilization", "1.5"]),
        (["m", "--max-modle-len", "8"], {}, ["--max-modle-len"]),
        (["m"], {"AWQSERVE_PROT": "1"}, ["AWQSERVE_PROT", "did you mean AWQSERVE_PORT"]),
        (["m"], {"AWQSERVE_PORT": "tcp://10.0.0.1:80"}, ["AWQSERVE_PORT", "tcp://10.0.0.1:80"]),
        (["m"], {"AWQSERVE_IN_PROCESS": "maybe"}, ["AWQSERVE_IN_PROCESS", "'maybe'"]),
        (["m", "--config", "/nonexistent.yaml"], {}, ["/nonexistent.yaml", "No such file"]),
    ],
)
def test_wrong_options_are_named(
    arguments: list[str], environment: dict[str, str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, arguments, environment)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("max-modle-len: 5", "did you mean max-model-len"),
        ("config: other.yaml", "config: unknown option"),
        ("port: true", "True is a bool"),
        ("port: [1]", "is a list"),
        ("in-process: 1", "expected true or false"),
        ("- port", "found a list"),
        ("port: {", "not valid YAML"),
        ("", "found a NoneType"),
    ],
)
def test_wrong_files_are_named(content: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(content)
    line = refusal(capsys, ["m", "--config", str(file)], {})
    assert part in line
    assert str(file) in line


def test_help_needs_nothing_heavy() -> None:
    """The engine's process imports this module as well: it must cost neither the web framework nor torch."""
    program = (
        "import sys, server.__main__; print([m for m in ('torch', 'fastapi', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
    shown = subprocess.run(
        [sys.executable, "-m", "server", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"--{option.name}" in shown for option in OPTIONS if option.name != "model")


def test_serving_needs_no_torch_in_the_api_process() -> None:
    program = "import sys, server.serve; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command.main(["/nonexistent/model", "--port", str(port)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"awq-serve: error: cannot listen on 127.0.0.1 port {port}: Address already in use")


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, part in (("/nonexistent/model", "no such folder"), (str(tmp_path), "config.json")):
        assert command.main([model, "--port", "0"]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert part in line


def test_models_by_folder(tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    assert resolve_model(str(folder), None) == folder
    assert served_name(str(folder)) == "some-model"
    assert served_name("owner/name") == "owner/name"
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ModelFilesError, match="awq-quantize"):
        resolve_model(str(file), None)


def test_sampling_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text(
        json.dumps(
            {
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "repetition_penalty": 1.1,
                "typical_p": 0.9,
                "no_repeat_ngram_size": 3,
                "do_sample": True,
            }
        )
    )
    assert load_sampling_defaults(tmp_path, "auto") == SamplingDefaults(
        0.6, 0.95, 20, typical_p=0.9, repetition_penalty=1.1
    )
    assert "no_repeat_ngram_size 3 is not supported" in caplog.text
    assert load_sampling_defaults(tmp_path, "none") == SamplingDefaults()
    assert load_sampling_defaults(tmp_path / "elsewhere", str(tmp_path)) == SamplingDefaults(
        0.6, 0.95, 20, typical_p=0.9, repetition_penalty=1.1
    )
    with pytest.raises(ModelFilesError, match="no such file"):
        load_sampling_defaults(tmp_path, str(tmp_path / "elsewhere"))
    for content, part in (
        ('{"temperature": "hot"}', "temperature is 'hot'"),
        ('{"top_p": 7}', "top_p is 7"),
        ("[", "JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ModelFilesError, match=part):
            load_sampling_defaults(tmp_path, "auto")


@pytest.mark.slow
def test_a_checkpoint_without_tokenizer_json_has_it_made_once(tmp_path: Path) -> None:
    """From a GPT-2 style vocabulary and merges; in a process of its own, so transformers stays out of this one."""
    pieces = byte_level_tokenizer()._tokenizer
    pieces.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": END}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    path = ensure_tokenizer_file(tmp_path)
    assert path == tmp_path / "tokenizer.json"
    text = "The quick brown fox 你好"
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stamp = path.stat().st_mtime_ns
    assert ensure_tokenizer_file(tmp_path) == path
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_checkpoint_without_any_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"no tokenizer\.json, and none can be made"):
        ensure_tokenizer_file(tmp_path)
