"""Drafts: what is guessed, when it is worth while, and that outputs are those of plain decoding to the bit, whatever a request asks
for beside them."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.config import EngineConfig, NgramSpeculation
from server.engine.drafts import Drafter, Drafting, NgramIndex, StepTime
from server.engine.engine import Engine, build_engine
from server.engine.logits import LogitRules
from server.engine.matcher import GrammarMatcher
from server.engine.step import SamplingRow
from server.types import AbortReason, GenerateRequest, Pooling, PoolRequest, SamplingParams, StepOutput, TokenEvent
from tests.kernels.cpu_support import needs_native
from tests.server.engine.fake_model import expected_output, make_engine, request, tokens_of
from tests.server.real_edge import tiny_checkpoint


def longest_match(tokens: list[int], length: int, min_match: int, max_match: int) -> list[int]:
    """The definition: of the longest end that came before, where it did last, what came next."""
    for size in range(min(max_match, len(tokens)), min_match - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                found = list(tokens)
                for _ in range(length):
                    found.append(found[start + size + len(found) - len(tokens)])
                return found[len(tokens) :]
    return []


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 6),
)
def test_the_index_finds_what_the_definition_says(
    pieces: list[list[int]], min_match: int, more: int, length: int
) -> None:
    index, tokens = NgramIndex(min_match, min_match + more), []
    for piece in pieces:
        tokens += piece
        assert index.grow(tokens)
        assert index.continuation(tokens, length) == longest_match(tokens, length, min_match, min_match + more)


def test_a_long_prompt_is_indexed_over_several_steps() -> None:
    drafter = Drafter(NgramSpeculation(3))
    tokens = [*range(9000), 5, 6]
    assert [drafter.propose(tokens, 3, 0.0) for _ in range(3)] == [[], [], [7, 8, 9]]


def test_drafts_stop_where_they_are_wrong_and_come_back_where_they_are_right() -> None:
    drafter, tokens = Drafter(NgramSpeculation(4)), [1, 2, 1, 2]
    drafted = []
    for _ in range(500):
        drafts = drafter.propose(tokens, 4, 0.3)
        drafted.append(len(drafts))
        if drafts:
            drafter.learn(len(drafts), 0)
    assert drafted[0] == 4 and sum(drafted[20:]) <= 10 and max(drafted[20:]) == 1
    drafted = []
    for _ in range(150):
        drafts = drafter.propose(tokens, 4, 0.3)
        drafted.append(len(drafts))
        if drafts:
            drafter.learn(len(drafts), len(drafts))
    assert drafted[-10:] == [4] * 10


def test_drafts_are_as_many_as_pay() -> None:
    """With a chance of 3 in 4 each: one where a draft must be right in 0.6 of all cases, two in 0.5, none in 0.8."""
    for least_chance, number in ((0.8, 1), (0.6, 1), (0.5, 2), (0.1, 5)):
        assert len(Drafter(NgramSpeculation(5)).propose([1, 2, 1, 2], 5, least_chance)) == number
    assert Drafter(NgramSpeculation(5)).propose([1, 2, 1, 2], 2, 0.1) == [1, 2]
    # Reading the weights is most of a small step's time, and nothing of a large one's.
    assert StepTime(9.0, 1.0).marginal_share(1) == 0.1 and StepTime(9.0, 1.0).marginal_share(991) > 0.99


ALWAYS = Drafting(NgramSpeculation(4, 1, 3), StepTime(1e9, 1.0), 8)


def test_drafts_take_no_block_that_another_needs() -> None:
    """Four blocks of four tokens. The first sequence has filled its block but for the token to come: its drafts would go to
    the next one."""
    engine = make_engine(num_blocks=4, block_size=4, max_model_len=16, drafting=ALWAYS, vocabulary=1, max_num_seqs=2)
    engine.submit(request("a", [0, 0], 12))
    engine.step()
    [entry] = engine.scheduler.schedule(time.monotonic()).entries
    assert len(entry.drafts) == 4 and len(entry.sequence.block_table) == 2
    engine.scheduler.block_manager.trim(entry.sequence)
    engine.submit(request("b", [0] * 14, 2))  # needs all four
    [entry] = engine.scheduler.schedule(time.monotonic()).entries
    assert len(entry.drafts) == 1 and len(entry.sequence.block_table) == 1


def test_prompts_keep_half_of_what_decodes_leave() -> None:
    engine = make_engine(drafting=ALWAYS, vocabulary=1, max_num_batched_tokens=9, block_size=16, max_num_seqs=2)
    engine.submit(request("a", [0, 0], 30))
    engine.step()
    engine.submit(request("b", [0] * 20, 2))
    first, second = engine.scheduler.schedule(time.monotonic()).entries
    assert len(first.drafts) == 4 and second.num_new_tokens == 4


def test_rows_of_a_sequence_that_ended_while_its_step_ran_are_passed_over() -> None:
    engine = make_engine(drafting=ALWAYS, vocabulary=3, max_num_batched_tokens=40)
    for name, prompt in (("gone", [0, 1, 2, 0, 1, 2]), ("stays", [2, 1, 0, 2, 1])):
        engine.submit(request(name, prompt, 25))
    events = [*engine.step().events, *engine.step().events]
    scheduler, runner = engine.scheduler, engine.runner
    batch = scheduler.schedule(time.monotonic())
    handle = runner.launch(batch)
    assert batch.entries[0].sequence.request_id == "gone" and batch.entries[0].drafts
    engine.abort("gone", AbortReason.CLIENT)
    events += scheduler.postprocess(batch, runner.collect(handle), time.monotonic())
    while engine.has_work():
        events += engine.step().events
        engine.scheduler.block_manager.check()
    assert tokens_of([event for event in events if event.request_id == "stays"]) == expected_output(
        [2, 1, 0, 2, 1], 25, 3
    )
    assert engine.scheduler.block_manager.counts.used == 0


# The law on real models.


def engine_of(model: Path, speculative: NgramSpeculation | None, **options: Any) -> Engine:
    config = {
        "max_model_len": 160, "max_num_seqs": 6, "kv_cache_memory_bytes": 2**21, "threads": 1, "max_num_batched_tokens": 64,
        "kernel_backend": "reference",
    }  # fmt: skip
    engine = build_engine(EngineConfig(str(model), speculative=speculative, **{**config, **options}))  # type: ignore[arg-type]
    if engine.scheduler.drafting is not None:  # whatever they cost here
        engine.scheduler.drafting = replace(engine.scheduler.drafting, step_time=StepTime(1e9, 1.0))
    return engine


class Run:
    """What an engine answers to requests that arrive at given steps, and how."""

    def __init__(self, engine: Engine, arrivals: list[tuple[int, GenerateRequest | PoolRequest]]) -> None:
        self.events: dict[str, list[TokenEvent]] = {}
        self.outputs: list[StepOutput] = []
        waiting = list(arrivals)
        step = 0
        while waiting or engine.has_work():
            due = [item for item in waiting if item[0] <= step or not engine.has_work()]
            waiting = [item for item in waiting if item not in due]
            for _, submitted in due:
                engine.submit(submitted)
            self.outputs.append(engine.step())
            engine.scheduler.block_manager.check()
            for event in self.outputs[-1].events:
                self.events.setdefault(event.request_id, []).append(event)
            step += 1
        assert engine.scheduler.block_manager.counts.used == 0

    @property
    def num_accepted(self) -> int:
        return sum(sum(output.stats.num_accepted_per_position) for output in self.outputs)

    @property
    def num_drafted(self) -> int:
        return sum(output.stats.num_draft_tokens for output in self.outputs)

    def answers(self) -> dict[str, Any]:
        """All that a client can see of each request, however many tokens came at a time."""
        found = {}
        for request_id, events in self.events.items():
            last = events[-1]
            assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
            logprobs = [entry for event in events for entry in event.logprobs or []]
            prompt = [event.prompt_logprobs for event in events if event.prompt_logprobs is not None]
            tokens = [token for event in events for token in event.token_ids]
            found[request_id] = (
                tokens, last.finish_reason, last.stop_token_id, last.error, last.is_request_fault, logprobs, prompt,
                last.embedding,
            )  # fmt: skip
        return found


GRAMMARS = ("start: /(ab|a){30,}/", json.dumps({"type": "array", "items": {"enum": [1, 12, "a"]}, "minItems": 12}))


def lark_of(index: int | None) -> str | None:
    import llguidance

    if index is None:
        return None
    return GRAMMARS[index] if index == 0 else llguidance.LLMatcher.grammar_from_json_schema(GRAMMARS[index])


FEW = (40, 41, 42, 43)  # a vocabulary so small that texts repeat
REQUESTS = st.fixed_dictionaries(
    {
        "step": st.integers(0, 12),
        "prompt": st.lists(st.sampled_from((*FEW, 90, 200)), min_size=1, max_size=30),
        "group": st.booleans(),
        "sampling": st.fixed_dictionaries(
            {
                "max_tokens": st.sampled_from((1, 3, 20, 200)),
                "temperature": st.sampled_from((0.0, 0.7, 2.0)),
                "seed": st.integers(0, 2**63 - 1),
                "allowed_token_ids": st.sampled_from((None, FEW, FEW[:2], (*FEW, 2))),
                "min_tokens": st.sampled_from((0, 0, 9)),
            },
            optional={
                "top_p": st.just(0.8),
                "top_k": st.just(3),
                "min_p": st.just(0.1),
                "typical_p": st.just(0.7),
                "stop_token_ids": st.just((FEW[1],)),
                "ignore_eos": st.just(True),
                "presence_penalty": st.just(1.5),
                "frequency_penalty": st.just(0.7),
                "repetition_penalty": st.just(1.3),
                "logit_bias": st.just(((FEW[0], 4.0), (FEW[2], -3.0))),
                "bad_words": st.just(((FEW[0], FEW[1]), (FEW[2], FEW[2], FEW[3]))),
                "num_logprobs": st.integers(0, 3),
                "num_prompt_logprobs": st.integers(0, 2),
            },
        ),
        "grammar": st.sampled_from((None, None, None, 0, 1)),
    }
)


def requests_of(drawn: list[dict[str, Any]]) -> list[tuple[int, GenerateRequest | PoolRequest]]:
    arrivals: list[tuple[int, GenerateRequest | PoolRequest]] = []
    for index, fields in enumerate(drawn):
        options = dict(fields["sampling"])
        options["min_tokens"] = min(options["min_tokens"], options["max_tokens"])
        grammar = lark_of(fields["grammar"])
        if grammar is not None:  # over the whole vocabulary: the few tokens spell none of its texts
            options["allowed_token_ids"] = None
        for sibling in range(2 if fields["group"] else 1):
            sampling = SamplingParams(**{**options, "grammar": grammar, "seed": (options["seed"] + sibling) % 2**63})
            arrivals.append(
                (
                    fields["step"],
                    GenerateRequest(
                        f"{index}.{sibling}", fields["prompt"], sampling, time.monotonic(),
                        group_id=str(index) if fields["group"] else "",
                    ),
                )
            )  # fmt: skip
    arrivals.append((3, PoolRequest("pooled", [*FEW, *FEW], Pooling.MEAN, time.monotonic())))
    return arrivals


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pair(tiny: Path) -> Iterator[tuple[Engine, Engine]]:
    engines = engine_of(tiny, None), engine_of(tiny, NgramSpeculation(5, 1, 3))
    yield engines
    for engine in engines:
        engine.close()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(REQUESTS, min_size=1, max_size=8))
def test_outputs_are_those_of_plain_decoding(pair: tuple[Engine, Engine], drawn: list[dict[str, Any]]) -> None:
    plain, drafted = (Run(engine, requests_of(drawn)) for engine in pair)
    assert drafted.answers() == plain.answers()


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(REQUESTS, min_size=1, max_size=12))
def test_outputs_are_those_of_plain_decoding_in_many_loads(
    pair: tuple[Engine, Engine], drawn: list[dict[str, Any]]
) -> None:
    plain, drafted = (Run(engine, requests_of(drawn)) for engine in pair)
    assert drafted.answers() == plain.answers()


def repetitive(count: int = 3, **options: Any) -> list[tuple[int, GenerateRequest | PoolRequest]]:
    """Requests whose outputs repeat, with drafts right and wrong."""
    allowed = None if "grammar" in options else FEW
    fields = {"temperature": 0.6, "ignore_eos": True, "allowed_token_ids": allowed, **options}
    return [
        (0, GenerateRequest(str(index), [*FEW, *FEW, index], SamplingParams(60, seed=index, **fields), 0.0))
        for index in range(count)
    ]


def test_the_law_has_something_to_say(pair: tuple[Engine, Engine]) -> None:
    """Drafts right and wrong under every rule, and fewer steps for it."""
    rules: list[dict[str, Any]] = [
        {}, {"frequency_penalty": 0.7, "presence_penalty": 0.3}, {"repetition_penalty": 1.1}, {"num_logprobs": 2},
        {"bad_words": ((FEW[0], FEW[1]),)}, {"logit_bias": ((FEW[0], 4.0),)}, {"min_tokens": 50, "stop_token_ids": (FEW[1],)},
        {"num_prompt_logprobs": 1}, {"typical_p": 0.8}, {"grammar": lark_of(0)}, {"grammar": lark_of(1)},
    ]  # fmt: skip
    for options in rules:
        plain, drafted = (Run(engine, repetitive(**options)) for engine in pair)
        assert drafted.answers() == plain.answers()
        assert 0 < drafted.num_accepted < drafted.num_drafted and len(drafted.outputs) < len(plain.outputs), options
        assert plain.num_drafted == 0


def plant_counted_for_good(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Penalties go on counting drafts that were wrong."""
    penalties = LogitRules.penalties
    monkeypatch.setattr(LogitRules, "penalties", lambda self, output, num_drafts=0: penalties(self, output, 0))
    return {"frequency_penalty": 1.0}


def plant_no_drafts_in_history(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Rules are those of the output before the drafts."""
    output = SamplingRow.output.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(SamplingRow, "output", property(lambda row: output(replace(row, drafts=()))))
    return {"bad_words": ((FEW[0], FEW[1]), (FEW[1], FEW[2]))}


def plant_one_random_number(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All rows of a step draw the same number."""
    monkeypatch.setattr(SamplingRow, "num_output_tokens", property(lambda row: row.sequence.num_output_tokens))
    return {}


def plant_no_rewind(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The grammar stays where the drafts brought it."""
    monkeypatch.setattr(GrammarMatcher, "rewind", lambda self, num_tokens: None)
    return {"grammar": lark_of(0)}


@pytest.mark.parametrize(
    "plant", [plant_counted_for_good, plant_no_drafts_in_history, plant_one_random_number, plant_no_rewind]
)
def test_planted_bugs_break_the_law(tiny: Path, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = engine_of(tiny, None), engine_of(tiny, NgramSpeculation(5, 1, 3))
    options = plant(monkeypatch)
    with pytest.raises(AssertionError):
        plain, drafted = (Run(engine, repetitive(6, **options)) for engine in engines)
        assert drafted.answers() == plain.answers()
    for engine in engines:
        engine.close()


def test_the_context_ends_an_output_in_the_middle_of_its_drafts(pair: tuple[Engine, Engine]) -> None:
    for length in range(150, 160):
        sampling = SamplingParams(100, temperature=0.0, ignore_eos=True, allowed_token_ids=(FEW[0],))
        arrivals: list[tuple[int, GenerateRequest | PoolRequest]] = [
            (0, GenerateRequest("a", [FEW[0]] * length, sampling, 0.0))
        ]
        plain, drafted = (Run(engine, arrivals) for engine in pair)
        assert drafted.answers() == plain.answers()
        [answer] = drafted.answers().values()
        assert len(answer[0]) == 160 - length


TEXT = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return width * height
"""


def demo_requests(demo_model: Path) -> list[tuple[int, GenerateRequest | PoolRequest]]:
    """Code to be copied, text to be continued, and JSON, greedy and sampled."""
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    arrivals: list[tuple[int, GenerateRequest | PoolRequest]] = []
    prompts = (
        f"{TEXT}\n# The same function again:\n{TEXT}\n# And again:\n",
        "One, two, three, four, one, two,",
        "Water boils",
    )
    for index, prompt in enumerate(prompts):
        for temperature, options in ((0.0, {}), (0.8, {"num_logprobs": 2}), (0.5, {"frequency_penalty": 0.2})):
            sampling = SamplingParams(48, temperature=temperature, seed=index, **options)  # type: ignore[arg-type]
            name = f"{index}.{temperature}"
            arrivals.append((index, GenerateRequest(name, tokenizer.encode(prompt).ids, sampling, time.monotonic())))
    schema = lark_of(1)
    sampling = SamplingParams(30, temperature=1.0, seed=1, grammar=schema)
    arrivals.append((2, GenerateRequest("grammar", tokenizer.encode("A list: ").ids, sampling, time.monotonic())))
    return arrivals


@needs_native
def test_outputs_of_the_demo_model(demo_model: Path) -> None:
    options = {"kernel_backend": "cpu", "max_model_len": 512, "kv_cache_memory_bytes": 2**26}
    arrivals = demo_requests(demo_model)
    random.Random(0).shuffle(arrivals)
    plain, drafted = (
        Run(engine_of(demo_model, speculative, **options), arrivals) for speculative in (None, NgramSpeculation(6))
    )
    assert drafted.answers() == plain.answers()
    num_times = [sum(len(events) for events in run.events.values()) for run in (plain, drafted)]  # that tokens came
    assert drafted.num_accepted > 60 and num_times[0] - num_times[1] > 60
    assert len(drafted.outputs) < len(plain.outputs)
