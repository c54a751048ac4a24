"""llama.cpp's engine measured as `python -m server.engine_bench` measures ours: prefill of one prompt, decode by batch size.

Runs in an environment of its own that has llama-cpp-python:  python docs/compare/llama_cpp_engine.py MODEL.gguf
The last line is JSON. Medians; decoding starts with `--context` tokens in every sequence.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import time

import llama_cpp


def decode(context: ctypes.c_void_p, batch: llama_cpp.llama_batch, rows: list[tuple[int, int, int, bool]]) -> None:
    """rows: (token, position, sequence, wants logits)."""
    batch.n_tokens = len(rows)
    for index, (token, position, sequence, logits) in enumerate(rows):
        batch.token[index] = token
        batch.pos[index] = position
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = sequence
        batch.logits[index] = logits
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")


def greedy(context: ctypes.c_void_p, index: int, vocabulary: int) -> int:
    """llama.cpp's own samplers would do the same; ctypes' argmax over a whole row would measure ctypes."""
    logits = llama_cpp.llama_get_logits_ith(context, index)
    return int(logits[0] * 1000) % vocabulary  # any token will do: reading one logit waits for the step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()

    llama_cpp.llama_backend_init()
    silence = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it as long as it lives
    llama_cpp.llama_log_set(silence, None)
    model = llama_cpp.llama_model_load_from_file(options.model.encode(), llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    largest = max(options.batch_sizes)
    params.n_ctx = largest * (max(options.prompt, options.context + 2 * options.steps) + 64)
    params.n_batch, params.n_ubatch, params.n_seq_max = 512, 512, largest
    params.n_threads = params.n_threads_batch = options.threads
    params.kv_unified = False  # a stream per sequence: faster here than one cache that all attend over
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    memory = llama_cpp.llama_get_memory(context)
    generator = random.Random(0)

    def prefill(sequence: int, length: int) -> float:
        tokens = [generator.randrange(vocabulary) for _ in range(length)]
        started = time.perf_counter()
        for first in range(0, length, 512):
            part = tokens[first : first + 512]
            rows = [(t, first + i, sequence, first + i == length - 1) for i, t in enumerate(part)]
            decode(context, batch, rows)
        greedy(context, batch.n_tokens - 1, vocabulary)
        return time.perf_counter() - started

    seconds = []
    for _ in range(options.repetitions + 1):
        llama_cpp.llama_memory_clear(memory, True)
        seconds.append(prefill(0, options.prompt))
    result = {"prefill_tokens_per_second": round(options.prompt / statistics.median(seconds[1:]), 1), "decode": []}
    print(f"prefill of {options.prompt:<13}{result['prefill_tokens_per_second']:>10} tokens/s")
    for size in options.batch_sizes:
        llama_cpp.llama_memory_clear(memory, True)
        for sequence in range(size):
            prefill(sequence, options.context)
        tokens, seconds = [1] * size, []
        for step in range(2 * options.steps):
            started = time.perf_counter()
            decode(context, batch, [(tokens[s], options.context + step, s, True) for s in range(size)])
            tokens = [greedy(context, index, vocabulary) for index in range(size)]
            seconds.append(time.perf_counter() - started)
        rate = round(size / statistics.median(seconds[options.steps :]), 1)
        result["decode"].append({"batch_size": size, "tokens_per_second": rate})
        print(f"decode, batch {size:<10}{rate:>10} tokens/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
