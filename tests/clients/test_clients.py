"""Clients that people use, each in its own interpreter, against a server with the demo model: the official JavaScript client,
LangChain, LiteLLM and lm-eval. `make check` installs them; npm fetches its own for the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.served import Server

HERE = Path(__file__).parent
PYTHON = HERE.parent.parent / ".venv" / "clients" / "bin" / "python"
JAVASCRIPT_CLIENT = "openai@7"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(demo_model: Path) -> Iterator[Server]:
    flags = ("--served-model-name", "demo", "--chat-template", str(HERE / "template.jinja"), "--max-model-len", "2048")
    with Server(demo_model, *flags, "--speculative", "ngram:4", "--kv-cache-memory-bytes", "200M") as server:
        yield server
    assert "Traceback" not in "".join(server.lines)


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """The command's output; asserts that it went well."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def client_python() -> Path:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: run `make clients` first")
    return PYTHON


@pytest.mark.parametrize("name", ["langchain", "litellm"])
def test_python_clients(server: Server, name: str) -> None:
    output = run(client_python(), HERE / f"{name}_client.py", server.url)
    assert output.count(" ok\n") == 5, output


@pytest.mark.skipif(shutil.which("npm") is None or shutil.which("node") is None, reason="needs node and npm")
def test_the_official_javascript_client(server: Server, tmp_path: Path) -> None:
    run("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent", JAVASCRIPT_CLIENT, cwd=tmp_path)
    shutil.copy(HERE / "openai_client.mjs", tmp_path)
    output = run("node", "openai_client.mjs", server.url, cwd=tmp_path)
    assert output.count(" ok\n") == 6, output


def test_lm_eval_scores_a_task(server: Server, demo_model: Path, tmp_path: Path) -> None:
    """Its figures are those of the log probabilities that the server gives for the same texts."""
    data = HERE / "capitals.jsonl"
    (tmp_path / "capitals.yaml").write_text((HERE / "capitals.yaml").read_text().replace("DATA", str(data)))
    arguments = f"model=demo,base_url={server.url}/v1/completions,tokenizer={demo_model},num_concurrent=2,max_retries=1"
    offline = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OPENAI_API_KEY": "none",
    }
    command = ("-m", "lm_eval", "--model", "local-completions", "--model_args", arguments, "--tasks", "capitals")
    output = ("--include_path", tmp_path, "--output_path", tmp_path / "out", "--log_samples", "--batch_size", "4")
    run(client_python(), *command, *output, cwd=tmp_path, **offline)
    [results] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["capitals"]
    assert scores["acc,none"] == 1.0, scores
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 6
    for sample in lines:
        document = sample["doc"]
        for choice, [answer] in zip((document["right"], document["wrong"]), sample["resps"], strict=True):
            expected = likelihood(server, tokenizer, f"The capital of {document['country']} is", f" {choice}")
            assert abs(float(answer[0]) - expected) < 1e-3, sample


def likelihood(server: Server, tokenizer: Tokenizer, prompt: str, answer: str) -> float:
    ids = tokenizer.encode(prompt + answer).ids
    fields = {"echo": True, "logprobs": 0, "max_tokens": 0}
    logprobs = server.complete(ids, **fields)["choices"][0]["logprobs"]["token_logprobs"]
    return sum(logprobs[len(tokenizer.encode(prompt).ids) :])
