"""Runs the CPU image's root file system as a container (runc, no engine) and checks what docker/ promises.

    python -m tests.docker.run_image ROOT MODEL_FOLDER [--memory BYTES] [--processors N]

Read-only root, no capabilities, a user that is not root, the model mounted read-only, memory and processor limits; on the
host's network, since the point is the server, on a port of the loopback interface. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

USER = 10001
PORT = 18763
RUNTIME = "runc"
PERIOD = 100_000  # microseconds, of the processor quota


def runtime_config(root: Path, model: Path, memory: int, processors: float, port: int) -> dict[str, Any]:
    """The OCI runtime configuration: what `docker run --read-only --cap-drop ALL --memory --cpus` would make."""
    variables = {
        "PATH": "/opt/awq-serve/bin:/usr/bin:/bin",
        "HOME": "/cache",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "AWQSERVE_MODEL": "/model",
        "AWQSERVE_HOST": "127.0.0.1",
        "AWQSERVE_PORT": str(port),
    }

    def scratch(path: str, *options: str) -> dict[str, Any]:
        return {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", *options]}

    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": True},
        "process": {
            "terminal": False,
            "user": {"uid": USER, "gid": USER},
            "args": ["/usr/bin/tini", "--", "/opt/awq-serve/bin/awq-serve"],
            "env": [f"{name}={value}" for name, value in variables.items()],
            "cwd": "/cache",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            scratch("/dev", "mode=755"),
            scratch("/tmp", "nodev", "mode=1777"),
            scratch("/cache", "nodev", f"uid={USER}", f"gid={USER}"),
            {"destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "ro"]},
            {"destination": "/model", "type": "none", "source": str(model.resolve()), "options": ["rbind", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")],
            "resources": {
                "memory": {"limit": memory},
                "cpu": {"quota": int(processors * PERIOD), "period": PERIOD},
            },
        },
    }


def healthy(name: str) -> bool:
    """What the image's HEALTHCHECK says, run in the container."""
    command = ["/opt/awq-serve/bin/python", "-I", "/opt/awq-serve/healthcheck.py"]
    return subprocess.run([RUNTIME, "exec", name, *command], capture_output=True).returncode == 0


def check(root: Path, model: Path, memory: int, processors: float) -> dict[str, Any]:
    name = f"awq-serve-image-test-{os.getpid()}"
    with tempfile.TemporaryDirectory() as bundle, open(Path(bundle) / "log", "w+") as log:
        config = runtime_config(root, model, memory, processors, PORT)
        (Path(bundle) / "config.json").write_text(json.dumps(config))
        begin = time.monotonic()
        process = subprocess.Popen([RUNTIME, "run", "--bundle", bundle, name], stdout=log, stderr=log)
        try:
            found = _check_running(name, process, begin)
            subprocess.run([RUNTIME, "kill", name, "TERM"], check=True)
            found["exit_code"] = process.wait(60)
            assert found["exit_code"] == 0
        finally:
            if process.poll() is None:
                subprocess.run([RUNTIME, "delete", "--force", name])
                process.wait(60)
            log.seek(0)
            text = log.read()
            print(text)
    found["limits_in_log"] = re.findall(r"[^\n]*cgroup[^\n]*", text)
    assert any("cgroup limit" in line for line in found["limits_in_log"]), "the memory limit is not in the start log"
    return found


def _check_running(name: str, process: subprocess.Popen[bytes], begin: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as client:
        while True:
            assert process.poll() is None, "the container ended before it was ready"
            assert time.monotonic() - begin < 240, "not ready after 240 s"
            try:
                if client.get("/ready").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.1)
        found["seconds_to_ready"] = round(time.monotonic() - begin, 1)
        assert healthy(name)
        answer = client.post("/v1/completions", json={"prompt": "One, two,", "max_tokens": 32, "temperature": 0})
        assert answer.status_code == 200, answer.text
        found["text"] = answer.json()["choices"][0]["text"]
    state = json.loads(subprocess.run([RUNTIME, "state", name], capture_output=True, check=True).stdout)
    status = Path(f"/proc/{state['pid']}/status").read_text()
    [uids] = re.findall(r"^Uid:\t(.*)$", status, re.MULTILINE)
    [effective] = re.findall(r"^CapEff:\t(.*)$", status, re.MULTILINE)
    assert set(uids.split()) == {str(USER)} and int(effective, 16) == 0
    found["user"] = USER
    for folder, writable in {"/opt/awq-serve": False, "/model": False, "/cache": True, "/tmp": True}.items():
        tried = subprocess.run([RUNTIME, "exec", name, "/usr/bin/touch", f"{folder}/probe"], capture_output=True)
        assert (tried.returncode == 0) == writable, folder
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory", type=int, default=10**9)
    parser.add_argument("--processors", type=float, default=1.0)
    given = parser.parse_args()
    print(json.dumps(check(given.root, given.model, given.memory, given.processors)))


if __name__ == "__main__":
    main()
