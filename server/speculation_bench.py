"""`python -m server.speculation_bench MODEL`: what drafts win on text that repeats, and cost on text that does not.

Two engines on one model, one with drafts, answer the same requests in turn: code to be written out again with a change, a
document to be quoted, and stories sampled freely. Tokens per second are medians over the repetitions, ratios medians of the
pairs'. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from server.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.options import OptionError, parse_speculation
from server.types import GenerateRequest, SamplingParams

_CODE = '''class Inventory:
    """Items on the shelves of a shop, by name."""

    def __init__(self):
        self.items = {}
        self.history = []

    def add_item(self, name, quantity):
        if quantity <= 0:
            raise ValueError("quantity must be positive")
        self.items[name] = self.items.get(name, 0) + quantity
        self.history.append(("add", name, quantity))

    def remove_item(self, name, quantity):
        if quantity > self.items.get(name, 0):
            raise ValueError("there are not so many on the shelf")
        self.items[name] -= quantity
        self.history.append(("remove", name, quantity))

    def total_quantity(self):
        return sum(self.items.values())
'''
_DOCUMENT = """The library opens at nine in the morning and closes at six in the evening, on Saturdays at one. Books may be borrowed
for four weeks, films and music for one. Whoever returns a book late pays ten cents for every day. Two rooms on the upper floor
can be reserved by groups of up to twelve people; coffee may be drunk there, but not among the shelves. Lost cards are replaced
at the desk for two euros. Children under seven need an adult with them, and older ones a card of their own.
"""
WORKLOADS: dict[str, tuple[tuple[str, ...], float]] = {
    "code, edited": (
        (
            f"Here is a Python class:\n\n{_CODE}\nThe same class, with every method documented:\n\nclass Inventory:\n",
            f"{_CODE}\n\n# The class once more, renamed to Stock:\nclass Stock:\n",
        ),
        0.0,
    ),
    "document, quoted": (
        (
            f"{_DOCUMENT}\nThe rules of the library, word for word:\n\nThe library opens at",
            f'Text: "{_DOCUMENT}"\n\nRepeat the text above.\n\nText: "The library',
        ),
        0.0,
    ),
    "stories, sampled": (
        (
            "Once upon a time there was a clockmaker who",
            "The night train stopped between two stations, and the passengers",
            "My grandmother never told us why",
            "It rained for the third week when the letter",
        ),
        1.0,
    ),
}


@dataclass(frozen=True, slots=True)
class Result:
    workload: str
    batch_size: int
    plain_tokens_per_second: float
    drafted_tokens_per_second: float
    ratio: float
    acceptance: float  # of drafted tokens
    tokens_per_step: float  # of one sequence


@dataclass(frozen=True, slots=True)
class Run:
    tokens_per_second: float
    num_drafted: int
    num_accepted: int
    num_decodes: int  # sequences times steps
    outputs: dict[str, list[int]]


def run(engine: Engine, requests: Sequence[GenerateRequest]) -> Run:
    """The requests together, timed from the step on in which all have their first token."""
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[int]] = {request.request_id: [] for request in requests}
    started: float | None = None
    num_timed = num_drafted = num_accepted = num_decodes = 0
    while engine.has_work():
        output = engine.step()
        for event in output.events:
            outputs[event.request_id] += event.token_ids
        if started is None:
            if all(outputs.values()):
                started = time.perf_counter()
            continue
        num_timed += output.stats.num_generation_tokens
        num_drafted += output.stats.num_draft_tokens
        num_accepted += sum(output.stats.num_accepted_per_position)
        num_decodes += len(output.events)
    assert started is not None
    seconds = time.perf_counter() - started
    return Run(num_timed / seconds, num_drafted, num_accepted, num_decodes, outputs)


def requests_of(
    workload: str, batch_size: int, tokenizer: Tokenizer, max_tokens: int, round_: int
) -> list[GenerateRequest]:
    prompts, temperature = WORKLOADS[workload]
    encoded = [tokenizer.encode(prompts[index % len(prompts)]).ids for index in range(batch_size)]
    return [
        GenerateRequest(
            f"{workload}-{round_}-{index}",
            token_ids,
            SamplingParams(max_tokens, temperature=temperature, seed=1000 * round_ + index, ignore_eos=True),
            time.monotonic(),
        )
        for index, token_ids in enumerate(encoded)
    ]


def compare(
    plain: Engine,
    drafted: Engine,
    tokenizer: Tokenizer,
    workload: str,
    batch_size: int,
    max_tokens: int,
    repetitions: int,
) -> Result:
    pairs: list[tuple[Run, Run]] = []
    for round_ in range(repetitions + 1):
        requests = requests_of(workload, batch_size, tokenizer, max_tokens, round_)
        pair = run(plain, requests), run(drafted, requests)
        if pair[0].outputs != pair[1].outputs and plain.info.backend != "gpu":
            raise AssertionError(f"{workload}: drafts changed the output")
        pairs.append(pair)
    del pairs[0]  # it warmed up
    num_drafted = sum(second.num_drafted for _, second in pairs)
    num_tokens = sum(len(tokens) - 1 for _, second in pairs for tokens in second.outputs.values())
    return Result(
        workload,
        batch_size,
        round(statistics.median(first.tokens_per_second for first, _ in pairs), 1),
        round(statistics.median(second.tokens_per_second for _, second in pairs), 1),
        round(statistics.median(second.tokens_per_second / first.tokens_per_second for first, second in pairs), 3),
        round(sum(second.num_accepted for _, second in pairs) / max(num_drafted, 1), 3),
        round(num_tokens / sum(second.num_decodes for _, second in pairs), 2),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m server.speculation_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--speculative", default="ngram:5", help="as awq-serve takes it (default: ngram:5)")
    parser.add_argument("--kernel-backend", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="0: the physical cores available")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--output-len", type=int, default=160, help="tokens per request (default: 160)")
    parser.add_argument("--repetitions", type=int, default=5, help="pairs of runs (default: 5)")
    options = parser.parse_args(arguments)
    try:
        speculation = parse_speculation(options.speculative)
    except OptionError as error:
        parser.error(f"--speculative: {error}")

    def build(drafts: bool) -> Engine:
        return build_engine(
            EngineConfig(
                model=options.model,
                max_model_len=1024,
                max_num_seqs=max(options.batch_sizes),
                kernel_backend=options.kernel_backend,
                threads=options.threads,
                speculative=speculation if drafts else None,
            )
        )

    tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
    plain, drafted = build(False), build(True)
    print(f"{options.model}: {plain.info.backend} kernels, {options.speculative}")
    print(f"{'':<20}{'batch':>6}{'plain':>10}{'drafts':>10}{'ratio':>8}{'accepted':>10}{'tokens/step':>13}")
    results = []
    for workload in WORKLOADS:
        for batch_size in options.batch_sizes:
            result = compare(plain, drafted, tokenizer, workload, batch_size, options.output_len, options.repetitions)
            print(
                f"{workload:<20}{batch_size:>6}{result.plain_tokens_per_second:>10.1f}"
                f"{result.drafted_tokens_per_second:>10.1f}{result.ratio:>8.2f}{result.acceptance:>10.0%}"
                f"{result.tokens_per_step:>13.2f}",
                flush=True,
            )
            results.append(asdict(result))
    print(json.dumps({"model": options.model, "speculative": options.speculative, "results": results}))


if __name__ == "__main__":
    main()
