"""Frozen configuration of the server: engine, HTTP, and how a run is put together. The defaults here are the only ones."""

from __future__ import annotations

from dataclasses import dataclass, field

TOOL_CALL_PARSERS = ("hermes", "llama3", "mistral")


@dataclass(frozen=True, slots=True)
class NgramSpeculation:
    """Up to `num_tokens` drafts per sequence and step: what followed the sequence's last max_match, or fewer but at least
    min_match, tokens when they came before."""

    num_tokens: int
    min_match: int = 2
    max_match: int = 4


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine process is told. None means: chosen from the model and the machine at load, and logged."""

    model: str  # a local directory
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    device: str = "auto"  # "auto" (a GPU where there is one), "cpu" or "cuda"
    kernel_backend: str = "auto"
    dtype: str = "auto"  # of activations on a GPU: "auto" (float16), "float16" or "bfloat16"
    batch_invariant: bool = False  # on a GPU: sums in one order whatever the batch; CPUs do so always
    threads: int = 0  # 0: the physical cores this process may use
    kv_cache_dtype: str = "auto"  # "auto", "fp16" or "int8"; the reference back end keeps it in fp32
    cpu_activations: str = "int8"  # into quantized linears on the CPU: "int8" or, with more precision, "int16"
    lm_head_dtype: str = "auto"  # of an unquantized lm_head on the CPU: "auto" (int8), "int8", "int4" or "fp16"
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = 0.9  # share of the memory limit that weights, KV cache and workspace may take together
    scheduling_policy: str = "fcfs"  # "fcfs" or "priority"
    priority_aging_seconds: float = 10.0  # of waiting, that count as one level of priority
    verify_checksums: bool = True  # where the checkpoint has SHA256SUMS
    speculative: NgramSpeculation | None = None  # drafts from each sequence's own text; outputs stay the same
    seed: int | None = None  # of requests that bring none; None: entropy


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the API process is told. Of limits, 0 means none where the comment says so."""

    engine: EngineConfig
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...] = ()
    in_process: bool = False  # the engine in a thread of the API process: for debugging
    revision: str | None = None  # of a model that is a Hugging Face id
    generation_config: str = "auto"  # where sampling defaults come from: auto (the model's folder), none, or a folder
    chat_template: str | None = None  # a file that replaces the checkpoint's
    tool_call_parser: str = "auto"  # how the model writes tool calls; auto: by its chat template
    reasoning_parser: str = "auto"  # "think", "none", or auto: by the chat template
    drain_timeout: float = 5.0  # seconds that running requests get once the server is told to stop

    # Who may ask. Keys are "name:secret" or a secret alone; none at all: anybody.
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()  # of pages elsewhere whose scripts may call; none: no CORS headers at all
    allowed_methods: tuple[str, ...] = ("GET", "POST")
    allowed_headers: tuple[str, ...] = ("Authorization", "Content-Type", "X-Request-Id")
    allow_credentials: bool = False
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None  # of clients, which then need a certificate

    # How much.
    max_queued_requests: int = 256  # sequences that wait for a seat
    max_queued_tokens: int = 2**18  # prompt tokens that wait to be computed
    key_requests_per_minute: int = 0  # of one API key, or of all who need none; 0: no limit
    key_concurrent_requests: int = 0  # the same
    max_request_bytes: int = 4 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_connections: int = 4096

    # For how long; seconds.
    header_timeout: float = 10.0  # for a request's head to come whole
    body_timeout: float = 60.0  # for its body
    keep_alive_timeout: float = 5.0  # of a connection between two requests
    send_timeout: float = 30.0  # for a client to take any of what was sent to it

    log_level: str = "info"
    log_format: str = "text"  # or "json"
    access_log: bool = False
    log_requests: bool = False  # what is asked, prompts included
    max_log_len: int = 1000  # characters of a prompt in the log
    metrics_port: int | None = None  # a listener of its own, for which no key is needed
    metrics_prefix: str = "awqserve_"
    otlp_traces_endpoint: str | None = None
