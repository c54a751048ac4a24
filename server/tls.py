"""Whether the files of TLS can be used, known before anything heavy begins."""

from __future__ import annotations

import ssl
from pathlib import Path

from server.config import ServerConfig


def check_tls(config: ServerConfig) -> None:
    """Raises ValueError naming the option whose file cannot be used."""
    if config.ssl_certfile is None:
        return
    files = (
        ("ssl-certfile", config.ssl_certfile),
        ("ssl-keyfile", config.ssl_keyfile),
        ("ssl-ca-certs", config.ssl_ca_certs),
    )
    for name, file in files:
        if file is not None and not Path(file).is_file():
            raise ValueError(f"--{name} {file}: no such file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"--ssl-certfile {config.ssl_certfile}: no certificate with its key: {error}") from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(f"--ssl-ca-certs {config.ssl_ca_certs}: no certificates: {error}") from None
