"""The images' HEALTHCHECK: exit code 0 while /health answers 200. Goes past any proxy in the environment."""

import http.client
import os
import ssl
import sys

metrics_port = os.environ.get("AWQSERVE_METRICS_PORT")  # speaks plain HTTP whatever the other one does
port = int(metrics_port or os.environ["AWQSERVE_PORT"])
if metrics_port is None and "AWQSERVE_SSL_CERTFILE" in os.environ:
    # Whose certificate this is is known: the question is whether the server answers.
    context = ssl._create_unverified_context()
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=4, context=context)
else:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
try:
    connection.request("GET", "/health")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"no answer on port {port}: {error}")
