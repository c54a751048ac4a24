"""The options of the server's edge: who may ask, how much, for how long, and what is told of it."""

from __future__ import annotations

import re

from server.config import ServerConfig
from server.option_types import Option, OptionError, choice, flag, integer, number, size, text_value

_LOG_LEVELS = ("debug", "info", "warning", "error")
_SECONDS = number(0.1, 86400)


def _metrics_prefix(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", text):
        raise OptionError(f"{text!r} cannot begin the name of a metric (letters, digits, _ and :)")
    return text


def _http_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+\S*", text):
        raise OptionError(f"{text!r} is not a http:// or https:// URL")
    return text


EDGE_GROUPS: dict[str, tuple[Option, ...]] = {
    "security": (
        Option("api-key", "api_keys", text_value, "a key that clients must bring, as NAME:SECRET or SECRET; may be given "
               "more than once. Better in the environment or a file: everybody on the machine can read a command line "
               "(default: none, anybody may ask)", "KEY", is_list=True, one_each=True),
        Option("api-key-file", "api_key_file", text_value, "file of such keys, one a line", "FILE"),
        Option("allowed-origins", "allowed_origins", text_value, "origins whose pages may call (CORS); * for all "
               "(default: none)", "ORIGIN", is_list=True),
        Option("allowed-methods", "allowed_methods", text_value, "methods that those may use (default: GET POST)", "METHOD",
               is_list=True),
        Option("allowed-headers", "allowed_headers", text_value, "headers that those may send (default: Authorization "
               "Content-Type X-Request-Id)", "NAME", is_list=True),
        Option("allow-credentials", "allow_credentials", flag, "whether those may send cookies and the like"),
        Option("ssl-certfile", "ssl_certfile", text_value, "certificate chain (PEM): serve HTTPS", "FILE"),
        Option("ssl-keyfile", "ssl_keyfile", text_value, "its private key, where the certificate's file has none", "FILE"),
        Option("ssl-ca-certs", "ssl_ca_certs", text_value, "clients need a certificate signed by one of these (PEM)", "FILE"),
    ),
    "limits": (
        Option("max-queued-requests", "max_queued_requests", integer(0), "most sequences that wait for a seat; more are "
               "refused (429)", "N", aliases=("max-num-queued-reqs",)),
        Option("max-queued-tokens", "max_queued_tokens", size, "most prompt tokens that wait to be computed; more are refused "
               "(429)", "TOKENS", aliases=("max-num-queued-tokens",)),
        Option("key-requests-per-minute", "key_requests_per_minute", integer(0, 10**6), "requests that one API key may send "
               "within a minute; 0: any number", "N"),
        Option("key-concurrent-requests", "key_concurrent_requests", integer(0), "requests of one API key that may be under "
               "way at once; 0: any number", "N"),
        Option("max-request-bytes", "max_request_bytes", size, "largest request body", "BYTES"),
        Option("max-header-bytes", "max_header_bytes", size, "largest head of a request", "BYTES"),
        Option("max-connections", "max_connections", integer(1), "most open connections; the descriptor limit may allow "
               "fewer", "N"),
        Option("header-timeout", "header_timeout", _SECONDS, "for a request's head to come whole", "SECONDS"),
        Option("body-timeout", "body_timeout", _SECONDS, "for its body to come whole", "SECONDS"),
        Option("keep-alive-timeout", "keep_alive_timeout", _SECONDS, "that an idle connection stays open", "SECONDS"),
        Option("send-timeout", "send_timeout", _SECONDS, "that a client may take nothing of its answer", "SECONDS"),
    ),
    "logs, metrics and traces": (
        Option("log-level", "log_level", choice(*_LOG_LEVELS), "least level logged", "|".join(_LOG_LEVELS)),
        Option("log-format", "log_format", choice("text", "json"), "lines of text, or a JSON object a line", "text|json"),
        Option("access-log", "access_log", flag, "log every HTTP request, without its content"),
        Option("enable-log-requests", "log_requests", flag, "log prompts and sampling parameters"),
        Option("max-log-len", "max_log_len", integer(0), "most characters of a prompt in the log", "N"),
        Option("metrics-port", "metrics_port", integer(0, 65535), "port that serves /metrics and the probes alone, without "
               "keys or TLS (default: none, /metrics needs a key)", "PORT"),
        Option("metrics-prefix", "metrics_prefix", _metrics_prefix, "what metrics' names begin with; vllm: for dashboards "
               "made for vLLM", "PREFIX"),
        Option("otlp-traces-endpoint", "otlp_traces_endpoint", _http_url, "send traces there by OTLP over HTTP, as to "
               "http://collector:4318/v1/traces; needs the extra [otel]", "URL"),
    ),
}  # fmt: skip


def check_edge(config: ServerConfig) -> None:
    """Raises OptionError for options that do not go together."""
    if config.ssl_certfile is None:
        for name, value in (("ssl-keyfile", config.ssl_keyfile), ("ssl-ca-certs", config.ssl_ca_certs)):
            if value is not None:
                raise OptionError(f"--{name}: needs --ssl-certfile")
    if config.allow_credentials and "*" in config.allowed_origins:
        raise OptionError("--allow-credentials: needs --allowed-origins by name, not *")
    if config.metrics_port is not None and config.metrics_port == config.port != 0:
        raise OptionError(f"--metrics-port: {config.metrics_port} is --port already")
