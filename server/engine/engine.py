"""The engine: submit, step, abort. Synchronous and single-threaded; `server.engine.process` gives it a process and a pipe."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kernels.backend import Backend, BackendOptions, KVCacheSpec
from kernels.choice import create_backend
from server.checkpoint_files import verified
from server.config import EngineConfig
from server.engine.block_manager import BlockManager
from server.engine.drafts import Drafting, StepTime
from server.engine.kv_cache import DEFAULT_POOL_SHARE, GPU_POOL_SHARE, plan_kv_cache
from server.engine.matcher import GrammarFactory, GrammarQueue
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.step import ScheduledBatch, StepBudget, StepForecast
from server.memory import MemoryLimit, memory_limit
from server.model_config import ModelConfig, ModelError, load_model_config
from server.models.loader import load_decoder
from server.types import AbortReason, EngineInfo, FinishReason, GenerateRequest, PoolRequest, StepOutput, TokenEvent

logger = logging.getLogger(__name__)

DEFAULT_MAX_NUM_BATCHED_TOKENS = 512
DEFAULT_MAX_NUM_BATCHED_TOKENS_GPU = 2048

STEP_SECONDS = 0.15
"""What a step is to take when a prompt is being computed: everybody's next token waits for it."""
MIN_STEP_TOKENS = 32.0
ATTENTION_PRICE = 3.0
"""How much dearer a multiply-add of attention (fp32) is than one of the quantized linears (8-bit integers), measured."""

MAX_DRAFT_ROWS = 64
"""Rows of logits that a step's drafts may take together, beside one per sequence; on a CPU they pay in small batches alone."""
MAX_DRAFT_ROWS_GPU = 256
STEP_TIME_GPU = StepTime(128.0, 1.0)
"""Reading the weights is most of a small step: so many rows more take as long again. Assumed, not measured."""

GRAMMAR_WAIT_SECONDS = 0.02
"""How long an engine with nothing else to do looks away from its inbox for a grammar."""


class Engine:
    """Continuous batching over a scheduler and a runner. `info` describes what was built."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        info: EngineInfo,
        seed: int | None = None,
        grammars: GrammarQueue | None = None,
        forecast: StepForecast | None = None,
    ) -> None:
        self.on_launch: Callable[[list[str], float], None] | None = None
        self.forecast = forecast
        self.scheduler = scheduler
        self.grammars = grammars
        self.runner = runner
        self.info = info
        self._sequences: dict[str, Sequence] = {}
        self._pending_events: list[TokenEvent] = []  # of aborts, told with the next step's
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()

    def submit(self, request: GenerateRequest | PoolRequest) -> None:
        """Queues a request. Its id must be new; its prompt shorter than max_model_len, or no longer where it is only embedded: the
        edge has made sure.
        Raises ValueError where it brings a grammar and the engine has none."""
        assert request.request_id not in self._sequences, f"duplicate request id {request.request_id}"
        sampling = None if isinstance(request, PoolRequest) else request.sampling
        seed = 0 if sampling is None else sampling.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        sequence = Sequence(request, seed, list(request.prompt_token_ids))
        if sampling is None or sampling.grammar is None:
            self.scheduler.add(sequence)
        elif self.grammars is None:
            raise ValueError("this engine has no grammars")
        else:
            self.grammars.add(sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str, reason: AbortReason) -> None:
        """Ends a request; one that has ended already is passed over, since both sides may end it at the same time."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            if self.grammars is not None and self.grammars.remove(request_id) is not None:
                self.scheduler.add(sequence)  # which ends sequences, wherever they are
            self._pending_events.append(self.scheduler.finish(sequence, reason.finish_reason, time.monotonic()))

    def has_work(self) -> bool:
        return bool(self._pending_events or self.grammars) or self.scheduler.has_work()

    def step(self) -> StepOutput:
        """One step: schedule, compute, postprocess. Without anything to compute it only reports."""
        self._queue_those_with_grammars()
        started = time.monotonic()
        self._pending_events += self.scheduler.expire(started)
        batch: ScheduledBatch | None = None
        num_prompt_tokens = 0
        if self.scheduler.has_work():
            batch = self.scheduler.schedule(started)
            self._announce(batch)
            sampled = self.runner.collect(self.runner.launch(batch))
            now = time.monotonic()
            self._pending_events += self.scheduler.postprocess(batch, sampled, now)
            num_prompt_tokens = sum(
                entry.sequence.num_prompt_tokens
                for entry in batch.entries
                if entry.sequence.first_token == now or (entry.is_last_chunk and not entry.samples)
            )
        events, self._pending_events = self._pending_events, []
        for event in events:
            if event.finish_reason is not None:
                self._sequences.pop(event.request_id, None)
        num_generated = sum(len(event.token_ids) for event in events)
        stats = self.scheduler.stats(batch, num_prompt_tokens, num_generated, time.monotonic() - started)
        if self.grammars:
            stats = replace(stats, num_waiting=stats.num_waiting + len(self.grammars))
        return StepOutput(self.info.epoch, events, stats)

    def _announce(self, batch: ScheduledBatch) -> None:
        if self.on_launch is not None:
            seconds = 0.0 if self.forecast is None else self.forecast.seconds(batch)
            self.on_launch([entry.sequence.request_id for entry in batch.entries], seconds)

    def _queue_those_with_grammars(self) -> None:
        """Sequences whose matchers have come join the others; with nothing else to do, they are waited for a moment."""
        if not self.grammars:
            return
        is_idle = not self._pending_events and not self.scheduler.has_work()
        for sequence in self.grammars.take_late(time.monotonic()):
            self.scheduler.add(sequence)  # which ends it
        for sequence, error in self.grammars.take_ready(GRAMMAR_WAIT_SECONDS if is_idle else 0.0):
            self.scheduler.add(sequence)
            if error is not None:
                event = self.scheduler.finish(sequence, FinishReason.ERROR, time.monotonic(), error=error)
                self._pending_events.append(replace(event, is_request_fault=True))

    def close(self) -> None:
        """Gives back what the process's end does not."""
        if self.grammars is not None:
            self.grammars.close()


def timed_budget(model: ModelConfig, max_tokens: int, seconds_per_token: float) -> StepBudget:
    """A budget under which a step takes about STEP_SECONDS. Attention's share follows from the model's shape: multiply-adds per
    token and key, each as dear as ATTENTION_PRICE of the linears'."""
    hidden, q_size = model.hidden_size, model.num_heads * model.head_dim
    kv_size = model.num_kv_heads * model.head_dim
    per_layer = hidden * (2 * q_size + 2 * kv_size + 3 * model.active_intermediate_size)
    balanced_context = per_layer / (2 * q_size * ATTENTION_PRICE)
    return StepBudget(max_tokens, max(MIN_STEP_TOKENS, STEP_SECONDS / seconds_per_token), balanced_context)


def _memory(backend: Backend) -> MemoryLimit:
    """Of the device that the weights are on."""
    device = backend.memory()
    return memory_limit() if device is None else MemoryLimit(*device, "GPU memory")


def _create_backend(config: EngineConfig) -> Backend:
    options = BackendOptions(
        num_threads=config.threads,
        device=config.device,
        dtype=config.dtype,
        batch_invariant=config.batch_invariant,
        kv_cache_dtype=config.kv_cache_dtype,
        cpu_activations=config.cpu_activations,
        lm_head_dtype=config.lm_head_dtype,
    )
    return create_backend(config.kernel_backend, options)


def _max_batched_tokens(config: EngineConfig, on_gpu: bool) -> int:
    default = DEFAULT_MAX_NUM_BATCHED_TOKENS_GPU if on_gpu else DEFAULT_MAX_NUM_BATCHED_TOKENS
    max_batched = config.max_num_batched_tokens or max(default, config.max_num_seqs)
    if max_batched < config.max_num_seqs:
        raise ModelError(
            f"--max-num-batched-tokens {max_batched} is less than --max-num-seqs {config.max_num_seqs}: "
            "a step must hold one token of every running sequence"
        )
    return max_batched


def _max_draft_rows(config: EngineConfig, max_batched: int, on_gpu: bool) -> int:
    if config.speculative is None:
        return 0
    most = MAX_DRAFT_ROWS_GPU if on_gpu else MAX_DRAFT_ROWS
    return min(most, config.speculative.num_tokens * config.max_num_seqs, max_batched - 1)


def _drafting(config: EngineConfig, step_time: StepTime, max_rows: int, notes: list[str]) -> Drafting | None:
    """Adds to `notes` when drafts pay."""
    if config.speculative is None:
        return None
    notes.append(
        f"drafts of up to {config.speculative.num_tokens} tokens: at batch 1 worth while with a chance of "
        f"{step_time.marginal_share(1):.0%}, at 16 with {step_time.marginal_share(16):.0%}"
    )
    logger.info("%s", notes[-1])
    return Drafting(config.speculative, step_time, max_rows)


def build_engine(config: EngineConfig, epoch: int = 0) -> Engine:
    """Loads the model and sizes everything. Raises ModelError, FormatError or ValueError for what the user must mend."""
    model_dir = Path(config.model)
    model = load_model_config(model_dir)
    backend = _create_backend(config)
    on_gpu = backend.device.type == "cuda"
    max_batched = _max_batched_tokens(config, on_gpu)
    longest = config.max_model_len or model.max_context
    max_draft_rows = _max_draft_rows(config, max_batched, on_gpu)
    with verified(model_dir) if config.verify_checksums else contextlib.nullcontext():
        decoder = load_decoder(model_dir, model, backend, longest)

    def kv_spec(num_blocks: int) -> KVCacheSpec:
        return KVCacheSpec(
            model.num_layers, num_blocks, config.block_size, model.num_kv_heads, model.head_dim, config.kv_cache_dtype
        )

    plan = plan_kv_cache(
        config,
        model.max_context,
        backend.kv_block_nbytes(kv_spec(1)),
        decoder.weights.nbytes,
        backend.workspace_nbytes(
            max_batched,
            config.max_num_seqs + max_draft_rows,
            model.hidden_size,
            model.active_intermediate_size,
            model.vocab_size,
        ),
        _memory(backend),
        GPU_POOL_SHARE if on_gpu else DEFAULT_POOL_SHARE,
    )
    for note in plan.notes:
        logger.info("%s", note)
    eos_token_ids = frozenset(model.eos_token_ids)
    runner = Runner(
        decoder,
        backend,
        kv_spec(plan.num_blocks),
        max_batched,
        config.max_num_seqs,
        plan.max_model_len,
        eos_token_ids,
        max_draft_rows,
    )
    pass_seconds, num_tokens, step_time = runner.warm_up()
    seconds_per_token = pass_seconds / num_tokens
    timed = timed_budget(model, max_batched, seconds_per_token)
    budget = StepBudget(max_batched)
    notes = list(plan.notes)
    if config.max_num_batched_tokens is None and not on_gpu:
        budget = timed
        notes.append(
            f"a prompt token takes {seconds_per_token * 1e3:.2f} ms: a step holds up to "
            f"{min(max_batched, budget.affordable(0, budget.max_cost))} tokens, fewer far into a prompt"
        )
        logger.info("%s", notes[-1])
    block_manager = BlockManager(plan.num_blocks, config.block_size, config.enable_prefix_caching)
    aging = config.priority_aging_seconds if config.scheduling_policy == "priority" else None
    drafting = _drafting(config, STEP_TIME_GPU if on_gpu else step_time, max_draft_rows, notes)
    scheduler = Scheduler(
        block_manager, config.max_num_seqs, budget, plan.max_model_len, eos_token_ids, aging, drafting
    )
    info = EngineInfo(epoch, plan.max_model_len, plan.num_blocks, config.block_size, backend.name, notes)
    grammars = GrammarQueue(GrammarFactory(model_dir / "tokenizer.json", model.vocab_size, eos_token_ids))
    return Engine(scheduler, runner, info, config.seed, grammars, StepForecast(timed, seconds_per_token, pass_seconds))
