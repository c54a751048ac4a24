"""The whole path over HTTP: a real server process, the quantized demo model and tiny models, against transformers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.served import Server
from tests.tiny_models import add_tokenizer, cached_greedy, dequantized_model, load_reference, make_tiny_model

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Photosynthesis is the process by which",
]
GREEDY_PROMPTS = [
    *PROMPTS[1:],
    "The history of the railway in this country begins",
    "Dear Sir or Madam, I am writing to you because",
    "To make a good vegetable soup,",
]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def demo_server(demo_model: Path) -> Iterator[Server]:
    flags = ("--kernel-backend", "reference", "--max-model-len", "1024", "--max-num-seqs", "16")
    with Server(demo_model, *flags, "--kv-cache-memory-bytes", "400M") as server:
        yield server


def greedy(server: Server, prompt: object, max_tokens: int = NUM_TOKENS, **fields: object) -> list[int]:
    options = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": max_tokens}
    return server.complete(prompt, **{**options, **fields})["choices"][0]["token_ids"]


def check_outputs(outputs: list[list[int]], expected: list[list[int]], min_varied: int) -> None:
    """Equal token for token; all different, and `min_varied` of them varied enough that equality proves something."""
    assert outputs == expected
    assert len({tuple(output) for output in outputs}) == len(outputs)
    num_distinct = [len(set(output)) for output in outputs]
    assert sum(count >= 20 for count in num_distinct) >= min_varied, num_distinct


def test_greedy_equals_transformers_on_the_demo_model(demo_server: Server, demo_model: Path) -> None:
    model = dequantized_model(demo_model)
    choices = demo_server.complete(
        GREEDY_PROMPTS, max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, return_token_ids=True
    )["choices"]
    outputs = [choice["token_ids"] for choice in choices]
    expected = [cached_greedy(model, choice["prompt_token_ids"], NUM_TOKENS) for choice in choices]
    # Which prompt makes a small greedy model repeat itself depends on the last bits of the checkpoint.
    check_outputs(outputs, expected, min_varied=4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral", "llama-untied-biased"])
def test_greedy_equals_transformers_on_tiny_models(kind: str, tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path, kind, seed=4)
    add_tokenizer(directory)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in (1, 17, 45)]
    model = load_reference(directory)
    expected = [cached_greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    with Server(directory, "--kernel-backend", "reference", "--kv-cache-memory-bytes", "16M") as server:
        check_outputs([greedy(server, prompt) for prompt in prompts], expected, min_varied=len(prompts))


def mixed_requests(count: int) -> list[dict]:
    """Completions of every sort: greedy and seeded sampling, short and long, with shared prefixes."""
    requests = []
    for index in range(count):
        sampled = {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": index} if index % 2 else {"temperature": 0}
        prompt = (PROMPTS[1] + " ") * (index % 3) + PROMPTS[index % 4]
        requests.append({"prompt": prompt, "max_tokens": 8 + index % 5, **sampled})
    return requests


def answer(server: Server, request: dict) -> list[int]:
    return server.complete(**request, ignore_eos=True, return_token_ids=True)["choices"][0]["token_ids"]


def test_answers_do_not_depend_on_the_load_or_the_cache(demo_server: Server) -> None:
    """The same requests one by one and 16 at a time; the second round finds the prefix cache warm."""
    requests = mixed_requests(16)
    alone = [answer(demo_server, request) for request in requests]
    together: list[list[int]] = [[] for _ in requests]

    def send(index: int) -> None:
        together[index] = answer(demo_server, requests[index])

    threads = [threading.Thread(target=send, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert demo_server.metric("awqserve_prefix_cache_hits_total") > 0


def test_a_stream_is_readable_and_equals_the_whole(demo_server: Server) -> None:
    body = {"prompt": PROMPTS[3], "max_tokens": 24, "temperature": 0}
    whole = demo_server.complete(**body)["choices"][0]["text"]
    pieces = []
    with demo_server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    assert "".join(pieces) == whole and len(pieces) > 10
    words = whole.split()
    assert len(words) > 10 and sum(word.strip(".,\"'").isalpha() for word in words) > 0.8 * len(words), whole


def test_closing_a_stream_frees_its_blocks(demo_server: Server) -> None:
    body = {"prompt": PROMPTS[1], "max_tokens": 800, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=demo_server.url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            for _ in range(3):
                next(lines)
            assert demo_server.metric("awqserve_num_requests_running") == 1
        closed = time.monotonic()
        demo_server.wait_for_metric("awqserve_num_requests_running", 0, seconds=5)
        assert time.monotonic() - closed < 5
    demo_server.wait_for_metric("awqserve_kv_cache_usage_perc", 0)


BAD_REQUESTS: list[tuple[object, int, str | None]] = [
    (b'{"prompt": "a", ', 400, None),
    (b'"just text"', 400, None),
    ({"prompt": "a", "model": "gpt-5"}, 404, "model"),
    ({"prompt": 7}, 400, "prompt"),
    ({"prompt": "a", "max_tokens": "many"}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
    ({"prompt": "a", "temperature": 9}, 400, "temperature"),
    ({"prompt": "word " * 3000}, 400, None),
    ({"prompt": [49152]}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": "a", "invented": 1}, 400, "invented"),
    ({"prompt": "a", "best_of": 3}, 400, "best_of"),
]


def test_bad_requests_get_their_4xx_and_disturb_nobody(demo_server: Server) -> None:
    good: list[list[int]] = []
    expected = greedy(demo_server, PROMPTS[0], 40)
    neighbour = threading.Thread(target=lambda: good.append(greedy(demo_server, PROMPTS[0], 40)))
    neighbour.start()
    for body, status, param in BAD_REQUESTS:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = demo_server.client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == status, (body, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        if param is not None:
            assert error["param"] == param, (body, error)
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)):
        response = demo_server.client.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]
    neighbour.join()
    assert good == [expected]
    assert demo_server.client.get("/health").status_code == 200
