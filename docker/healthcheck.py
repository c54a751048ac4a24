"""The images' HEALTHCHECK: exit code 0 while /health answers 200. Goes past any proxy in the environment."""

import http.client
import os
import sys

connection = http.client.HTTPConnection("127.0.0.1", int(os.environ["AWQSERVE_PORT"]), timeout=4)
try:
    connection.request("GET", "/health")
    sys.exit(connection.getresponse().status != 200)
except OSError as error:
    sys.exit(f"no answer on port {connection.port}: {error}")
