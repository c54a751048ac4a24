"""From a request body to a `GenerationJob`. Past this point every field is valid and every prompt fits the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from server.api.answer import PLAIN_ANSWER, AnswerOptions
from server.api.chat_options import (
    answer_options,
    are_tags_special,
    compile_grammar,
    find_reasoning,
    grammar_source,
    tool_choice,
)
from server.api.chat_prompt import render_prompt
from server.api.context import ApiContext
from server.api.errors import RequestError
from server.api.prompts import refuse_longer_text, refuse_priority, refuse_unknown_ids, room_after, split_prompt
from server.api.schemas import ChatRequest, CompletionRequest, GenerationFields
from server.types import SamplingParams

MAX_CHOICES_PER_REQUEST = 2048
MIN_TEMPERATURE = 0.01  # of those above 0: dividing logits by less overflows and says no more than greedy does


@dataclass(frozen=True, slots=True)
class PromptJob:
    """One prompt. With `max_tokens` 0 nothing is generated. `echo_text` goes before the output's text."""

    token_ids: list[int]
    max_tokens: int
    echo_text: str = ""


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """What a request asks for, whichever endpoint it came by. `sampling.max_tokens` is replaced by each prompt's."""

    model: str
    prompts: list[PromptJob]
    num_choices: int  # per prompt
    sampling: SamplingParams
    stop_strings: tuple[str, ...]
    include_stop: bool  # in the output's text: the stop string, or the text of the stop token
    skip_special_tokens: bool
    cache_key: str
    stream: bool
    include_usage: bool
    continuous_usage: bool
    priority: int
    return_token_ids: bool
    include_metrics: bool
    timeout: float | None  # seconds
    echo: bool = False
    num_prompt_logprobs: int | None = None  # as the answer shows them by themselves
    answer: AnswerOptions = PLAIN_ANSWER  # of chat

    def sampling_of(self, prompt: PromptJob, choice: int) -> SamplingParams:
        seed = self.sampling.seed
        if seed is not None:
            seed = (seed + choice) % 2**63
        # The engine always samples; where nothing is to be generated, its one token is dropped.
        return replace(self.sampling, max_tokens=max(prompt.max_tokens, 1), seed=seed)


async def parse_completion(body: CompletionRequest, context: ApiContext) -> GenerationJob:
    model = context.model_name(body.model)
    token_ids, texts = await _tokenize_prompts(body, context)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens: must be at least 1 without echo (got 0)", param="max_tokens")
    scores_prompt = body.prompt_logprobs is not None or (bool(body.echo) and body.logprobs is not None)
    num_choices = len(token_ids) * (body.n or 1)
    if num_choices > MAX_CHOICES_PER_REQUEST:
        raise RequestError(
            f"n: prompts times n must be at most {MAX_CHOICES_PER_REQUEST} (got {num_choices})", param="n"
        )
    skips_special = body.skip_special_tokens is not False
    prompts = []
    for index, whole in enumerate(token_ids):
        ids = _truncated(whole, body, context, body.max_tokens)
        limit = room_after(ids, context, needs_output=body.max_tokens != 0 or scores_prompt)
        echo_text = ""
        if body.echo:
            echo_text = (
                texts[index] if texts is not None and ids is whole else context.tokenizer.decode(ids, skips_special)
            )
        asked = limit if body.max_tokens is None else body.max_tokens
        prompts.append(PromptJob(ids, min(asked, limit), echo_text))
    grammar = await compile_grammar(grammar_source(body), context)
    return replace(
        await _job(
            body,
            context,
            model,
            prompts,
            max(prompt.max_tokens for prompt in prompts) if body.max_tokens is None else body.max_tokens,
            num_logprobs=body.logprobs,
            num_prompt_logprobs=body.logprobs if body.echo else None,
            grammar=grammar,
        ),
        echo=bool(body.echo),
    )


async def parse_chat(body: ChatRequest, context: ApiContext) -> GenerationJob:
    model = context.model_name(body.model)
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs: only allowed when logprobs is true", param="top_logprobs")
    choice = tool_choice(body, context)
    text = render_prompt(body, context, choice.offered)
    if body.truncate_prompt_tokens is None:
        refuse_longer_text([text], context, "messages")
    [ids] = await context.tokenizer.encode_all([text], add_special_tokens=False)
    if not ids:
        raise RequestError("messages: the chat template makes an empty prompt of them", param="messages")
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    ids = _truncated(ids, body, context, asked)
    limit = room_after(ids, context, needs_output=True, param="messages")
    if asked is None:
        asked = context.defaults.max_new_tokens or limit
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    answer = answer_options(body, context, choice, find_reasoning(body, context, text))
    grammar = await compile_grammar(choice.grammar or grammar_source(body), context, answer.reasoning)
    job = await _job(body, context, model, [PromptJob(ids, min(asked, limit))], asked, num_logprobs, grammar=grammar)
    skips_special = job.skip_special_tokens and not are_tags_special(answer, context)
    return replace(job, answer=answer, skip_special_tokens=skips_special)


def _truncated(ids: list[int], body: GenerationFields, context: ApiContext, max_tokens: int | None) -> list[int]:
    """The end of a prompt that `truncate_prompt_tokens` asks for."""
    length = body.truncate_prompt_tokens
    if length is None:
        return ids
    if length == 0:
        raise RequestError("truncate_prompt_tokens: must be -1 or at least 1 (got 0)", param="truncate_prompt_tokens")
    if length < 0:
        # More than the context holds is cut to what fits, as ever: it must not take the prompt's place.
        room = max_tokens if max_tokens and max_tokens < context.max_model_len else 1
        length = context.max_model_len - room
    return ids[-length:] if len(ids) > length else ids


async def _tokenize_prompts(body: CompletionRequest, context: ApiContext) -> tuple[list[list[int]], list[str] | None]:
    """The prompts' token ids, and their texts where they came as text."""
    texts, id_lists = split_prompt(body.prompt)
    if texts is not None:
        if body.truncate_prompt_tokens is None:
            refuse_longer_text(texts, context, "prompt")
        id_lists = await context.tokenizer.encode_all(texts, body.add_special_tokens is not False)
        if not all(id_lists):
            raise RequestError("prompt: must not be empty: this model adds no token of its own", param="prompt")
        return id_lists, texts
    for ids in id_lists:
        refuse_unknown_ids(ids, context, "prompt")
    return id_lists, None


async def _job(
    body: GenerationFields,
    context: ApiContext,
    model: str,
    prompts: list[PromptJob],
    max_tokens: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
    grammar: str | None = None,
) -> GenerationJob:
    refuse_priority(body.priority, context)
    stream = bool(body.stream)
    if body.stream_options is not None and not stream:
        raise RequestError("stream_options: only allowed when stream is true", param="stream_options")
    if stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs: not available with stream", param="prompt_logprobs")
    asked_prompt_logprobs = [num for num in (body.prompt_logprobs, num_prompt_logprobs) if num is not None]
    sampling = replace(
        _sampling(body, context, max_tokens),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=max(asked_prompt_logprobs, default=None),
        grammar=grammar,
        bad_words=await _bad_words(body.bad_words or [], context),
    )
    options = body.stream_options
    stop = [] if body.stop is None else [body.stop] if isinstance(body.stop, str) else body.stop
    return GenerationJob(
        model=model,
        prompts=prompts,
        num_choices=body.n or 1,
        sampling=sampling,
        stop_strings=tuple(dict.fromkeys(stop)),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        cache_key=body.cache_salt or "",
        stream=stream,
        include_usage=options is not None and bool(options.include_usage or options.continuous_usage_stats),
        continuous_usage=options is not None and bool(options.continuous_usage_stats),
        priority=body.priority or 0,
        return_token_ids=bool(body.return_token_ids),
        include_metrics=bool(body.include_metrics),
        timeout=body.timeout,
        num_prompt_logprobs=body.prompt_logprobs,
    )


def _sampling(body: GenerationFields, context: ApiContext, max_tokens: int) -> SamplingParams:
    """The request's values where it has them, the model's defaults else."""
    defaults = context.defaults
    temperature = defaults.temperature if body.temperature is None else body.temperature
    top_k = defaults.top_k if body.top_k is None else body.top_k
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens: must be at most max_tokens ({max_tokens}) (got {min_tokens})", param="min_tokens"
        )
    refuse_unknown_ids(body.stop_token_ids or [], context, "stop_token_ids")
    refuse_unknown_ids(body.allowed_token_ids or [], context, "allowed_token_ids")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=max(temperature, MIN_TEMPERATURE) if temperature > 0 else 0.0,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=max(top_k, 0),
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        typical_p=defaults.typical_p if body.typical_p is None else body.typical_p,
        seed=body.seed,
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        ignore_eos=bool(body.ignore_eos),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or defaults.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias or {}, context),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
    )


def _logit_bias(biases: dict[str, float], context: ApiContext) -> tuple[tuple[int, float], ...]:
    token_ids = {}
    for key, bias in biases.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10 or int(key) >= context.vocab_size:
            raise RequestError(
                f"logit_bias: keys must be token ids from 0 to {context.vocab_size - 1} (got {key[:20]!r})",
                param="logit_bias",
            )
        token_ids[int(key)] = bias
    return tuple(token_ids.items())


async def _bad_words(words: list[str], context: ApiContext) -> tuple[tuple[int, ...], ...]:
    """The words as token ids, as they begin a text and as they follow a space."""
    texts = [text for word in words for text in (word, " " + word.lstrip())]
    encoded = await context.tokenizer.encode_all(texts, add_special_tokens=False)
    return tuple(dict.fromkeys(tuple(token_ids) for token_ids in encoded if token_ids))
