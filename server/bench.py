"""The `awq-bench` command: a load generator for OpenAI-compatible servers, closed loop or open loop.

It streams completions of random prompts and reports what a client sees: time to first token, inter-token latency, tokens
per second, cached prompt tokens. A table for people, then one JSON line for programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.load import (
    FALLBACK_VOCAB_SIZE,
    LoadError,
    Sample,
    Target,
    Workload,
    find_model,
    make_requests,
    run_load,
)
from server.sse_client import ClientError, SseClient

_DESCRIPTION = """\
Measure an OpenAI-compatible server with streamed completions.

Closed loop (the default): --concurrency clients, each sending its next request when it has its answer.
Open loop: --request-rate requests per second on average, at Poisson-distributed times, whatever the server manages.

Prompts are distinct and random, so that no prefix cache helps unless --shared-prefix-len asks for it. They are token
ids by default, of exactly the asked length; --prompt-format text is for servers that take text alone.
"""

_EPILOG = """\
examples:
  awq-bench http://127.0.0.1:8000                                  8 clients, 32 requests, 128 tokens in, 64 out
  awq-bench http://127.0.0.1:8000 --concurrency 1 --num-prompts 4
  awq-bench http://127.0.0.1:8000 --request-rate 2 --num-prompts 100 --input-len 512 --output-len 128
  awq-bench http://127.0.0.1:8000 --shared-prefix-len 96           what prefix caching is worth

Time to first token and inter-token latency are measured at the client, queueing included. Tokens are counted from the
server's usage, or by chunk where it sends none. Exit code 1 when a request failed.
"""

_PERCENTILES = (50, 90, 99)
_MAX_LENGTH = 2**20
_PROBE = Workload(num_prompts=1, input_len=8)


def percentile(values: Sequence[float], share: float) -> float:
    """`share` in 0..100, interpolated between neighbours; values need not be sorted."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * share / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds."""
    if not values:
        return None
    summary = {"mean": sum(values) / len(values)} | {f"p{share}": percentile(values, share) for share in _PERCENTILES}
    return {name: round(value * 1000, 3) for name, value in summary.items()}


def summarize(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The figures of a run that took `seconds`. Latencies in milliseconds, of successful requests only."""
    good = [sample for sample in samples if sample.error is None]
    num_output = sum(sample.num_tokens for sample in good)
    num_prompt = sum(sample.num_prompt_tokens or 0 for sample in good)
    gaps = [
        later - earlier
        for sample in good
        for earlier, later in zip(sample.chunk_times, sample.chunk_times[1:], strict=False)
    ]
    return {
        "num_requests": len(samples),
        "num_failed": len(samples) - len(good),
        "num_short": sum(sample.num_tokens < sample.num_asked_tokens for sample in good),
        "seconds": round(seconds, 3),
        "prompt_tokens": num_prompt,
        "cached_tokens": sum(sample.num_cached_tokens for sample in good),
        "output_tokens": num_output,
        "requests_per_second": round(len(good) / seconds, 4),
        "output_tokens_per_second": round(num_output / seconds, 3),
        "total_tokens_per_second": round((num_output + num_prompt) / seconds, 3),
        "ttft_ms": _spread([sample.first_token_seconds for sample in good]),
        "itl_ms": _spread(gaps),
        "tpot_ms": _spread([sample.per_token_seconds for sample in good if sample.num_tokens > 1]),
        "e2e_ms": _spread([sample.end - sample.start for sample in good]),
    }


def format_table(summary: dict[str, Any]) -> str:
    counts = [
        ("requests", f"{summary['num_requests']} ({summary['num_failed']} failed)"),
        ("duration", f"{summary['seconds']:.2f} s"),
        ("prompt tokens", f"{summary['prompt_tokens']} ({summary['cached_tokens']} cached)"),
        ("output tokens", f"{summary['output_tokens']}"),
        ("requests/s", f"{summary['requests_per_second']:.2f}"),
        ("output tokens/s", f"{summary['output_tokens_per_second']:.1f}"),
        ("total tokens/s", f"{summary['total_tokens_per_second']:.1f}"),
    ]
    lines = [f"{name:<28}{value:>24}" for name, value in counts]
    columns = ("mean", *(f"p{share}" for share in _PERCENTILES))
    lines += ["", f"{'milliseconds':<28}" + "".join(f"{column:>12}" for column in columns)]
    rows = {
        "ttft_ms": "time to first token",
        "itl_ms": "inter-token latency",
        "tpot_ms": "time per output token",
        "e2e_ms": "end to end",
    }
    for key, name in rows.items():
        if summary[key] is not None:
            lines.append(f"{name:<28}" + "".join(f"{summary[key][column]:>12.1f}" for column in columns))
    if summary["num_short"]:
        lines += ["", f"{summary['num_short']} requests got fewer tokens than they asked for"]
    return "\n".join(lines)


async def run_bench(
    url: str, workload: Workload, model: str | None, vocab_size: int | None, api_key: str | None, timeout: float
) -> tuple[dict[str, Any], list[Sample]]:
    """Measure. Raises LoadError when the server cannot be reached or refuses the first request."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    base_url = url.rstrip("/").removesuffix("/v1")
    client = SseClient(base_url, headers, timeout)
    name, served_vocab_size = await find_model(base_url, headers, model)
    vocab_size = vocab_size or served_vocab_size or FALLBACK_VOCAB_SIZE
    requests = make_requests(workload, vocab_size)
    # A prompt of its own: one of the measured prompts would be in the prefix cache then.
    [(probe, _)] = make_requests(replace(_PROBE, as_text=workload.as_text, seed=workload.seed + 2), vocab_size)
    target = Target(client, name, workload.temperature)
    await target.probe(probe)
    begin = time.monotonic()
    samples = await run_load(target, workload, requests)
    summary = {"url": base_url, "model": name} | _settings(workload) | summarize(samples, time.monotonic() - begin)
    return summary, samples


def _settings(workload: Workload) -> dict[str, Any]:
    return {
        "concurrency": workload.concurrency or None,
        "request_rate": workload.request_rate or None,
        "input_len": workload.input_len,
        "output_len": workload.output_len,
        "shared_prefix_len": workload.shared_prefix_len,
    }


def build_parser() -> argparse.ArgumentParser:
    default = Workload()
    parser = argparse.ArgumentParser(
        prog="awq-bench",
        usage="awq-bench URL [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="the server, with or without /v1")
    parser.add_argument("--model", help="the served model's name (default: the first one listed)")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS", help="of silence (default: %(default)g)"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help=f"clients, or most requests at once in open loop (default: {default.concurrency}; open loop: unlimited)",
    )
    load.add_argument(
        "--request-rate", type=float, default=0.0, metavar="R", help="requests per second: open loop (default: closed)"
    )
    load.add_argument("--num-prompts", type=int, default=default.num_prompts, help="requests (default: %(default)s)")
    load.add_argument(
        "--seed", type=int, default=default.seed, help="of prompts and arrival times (default: %(default)s)"
    )
    shape = parser.add_argument_group("requests")
    shape.add_argument("--input-len", type=int, default=default.input_len, metavar="N", help="(default: %(default)s)")
    shape.add_argument("--output-len", type=int, default=default.output_len, metavar="N", help="(default: %(default)s)")
    shape.add_argument(
        "--length-spread",
        type=float,
        default=default.length_spread,
        metavar="SHARE",
        help="lengths vary uniformly by this share, 0 to 1 (default: %(default)s)",
    )
    shape.add_argument(
        "--shared-prefix-len",
        type=int,
        default=default.shared_prefix_len,
        metavar="N",
        help="tokens that all prompts begin with (default: %(default)s)",
    )
    shape.add_argument("--prompt-format", choices=("ids", "text"), default="ids", help="(default: %(default)s)")
    shape.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids are drawn below it (default: what the server says)"
    )
    shape.add_argument("--temperature", type=float, default=default.temperature, help="(default: %(default)s)")
    return parser


def _workload(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Workload:
    limits = {
        "concurrency": (1, _MAX_LENGTH),
        "num_prompts": (1, _MAX_LENGTH),
        "input_len": (1, _MAX_LENGTH),
        "output_len": (1, _MAX_LENGTH),
        "shared_prefix_len": (0, options.input_len - 1),
        "length_spread": (0, 1),
        "request_rate": (0, 1e6),
        "vocab_size": (2, 2**31),
    }
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')}: {value} is not in {low}..{high}")
    concurrency = options.concurrency
    if concurrency is None:
        concurrency = 0 if options.request_rate else Workload().concurrency
    return Workload(
        num_prompts=options.num_prompts,
        concurrency=concurrency,
        request_rate=options.request_rate,
        input_len=options.input_len,
        output_len=options.output_len,
        length_spread=options.length_spread,
        shared_prefix_len=options.shared_prefix_len,
        as_text=options.prompt_format == "text",
        temperature=options.temperature,
        seed=options.seed,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all requests succeeded, 1 else, 2 for wrong options."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    workload = _workload(options, parser)
    try:
        summary, samples = asyncio.run(
            run_bench(options.url, workload, options.model, options.vocab_size, options.api_key, options.timeout)
        )
    except (LoadError, ClientError) as error:
        print(f"awq-bench: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(format_table(summary))
    failures = {sample.error for sample in samples if sample.error is not None}
    for failure in sorted(failures)[:5]:
        print(f"failed: {failure}", file=sys.stderr)
    print(json.dumps(summary))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
