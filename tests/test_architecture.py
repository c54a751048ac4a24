"""The import rules of the architecture, read from the sources, and what importing must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

HEAVY = ("torch", "transformers", "triton", "fastapi", "pydantic", "prometheus_client")

# (modules, what they must never import). A name stands for itself and all below it; every matching row applies.
RULES: list[tuple[str, tuple[str, ...]]] = [
    ("kernels", ("server", "quantizer", "transformers", "fastapi")),
    ("kernels.format", ("kernels.backend", "kernels.cpu", "kernels.gpu", "kernels.reference")),
    ("kernels.batch", ("kernels.backend", "kernels.choice", "kernels.cpu", "kernels.gpu", "kernels.reference")),
    ("kernels.backend", ("kernels.choice", "kernels.cpu", "kernels.gpu", "kernels.host", "kernels.reference")),
    ("kernels.gpu", ("kernels.cpu",)),
    ("kernels.cpu", ("kernels.gpu", "triton")),
    ("quantizer", ("server", "fastapi")),
    ("server", ("quantizer",)),
    ("server.types", ("server", "kernels", *HEAVY)),
    ("server.config", ("server", "kernels", *HEAVY)),
    ("server.model_config", ("server.engine", "server.models", "server.api", "kernels", *HEAVY)),
    ("server.architectures", ("server", "kernels", *HEAVY)),
    ("server.quantization_config", ("server", "kernels", *HEAVY)),
    ("server.memory", ("server", "kernels", *HEAVY)),
    ("server.engine.sequence", ("server.models", "kernels", *HEAVY)),
    ("server.engine.block_manager", ("server.models", "kernels", *HEAVY)),
    ("server.engine.scheduler", ("server.models", "kernels", *HEAVY)),
    ("server.engine.drafts", ("server.models", "kernels", *HEAVY)),
    ("server.engine.step", ("server.models", "kernels", *HEAVY)),
    ("server.engine.client", ("server.models", "kernels", *HEAVY)),
    ("server.engine", ("server.api", "server.text", "server.metrics", "prometheus_client", "fastapi")),
    ("server.models", ("server.api", "server.engine.scheduler", "server.engine.engine", "fastapi", "transformers")),
    (
        "server.api",
        ("torch", "kernels", "server.models", "server.engine.scheduler", "server.engine.engine", "transformers"),
    ),
    ("server.text", ("torch", "kernels", "server.models", "server.engine", "transformers")),
    ("server.metrics", ("torch", "kernels", "server.models", "server.engine", "server.api")),
]


def modules() -> dict[str, Path]:
    files = [path for package in ("kernels", "quantizer", "server") for path in (ROOT / package).rglob("*.py")]
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, at_run_time: bool = False) -> set[str]:
    """Absolute names of all imports anywhere in the file, lazy ones included, and those for type checking only unless
    `at_run_time`."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if at_run_time:
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(name: str, imported: set[str]) -> list[str]:
    return [
        f"{name} imports {other}, but {package} must not import {banned}"
        for package, bans in RULES
        if is_within(name, package)
        for banned in bans
        for other in sorted(imported)
        if is_within(other, banned)
    ]


def test_every_rule_speaks_of_a_module_that_exists() -> None:
    known = modules()
    assert {package for package, _ in RULES} <= known.keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_follow_the_rules(name: str) -> None:
    assert not violations(name, imports(modules()[name]))


def test_a_planted_import_is_found() -> None:
    assert violations("server.engine.scheduler", {"torch"}) and violations("server.api.app", {"server.models.decoder"})
    assert violations("kernels.cpu.backend", {"server.types"}) and not violations("server.api.app", {"server.types"})


def on_a_circle(graph: dict[str, set[str]]) -> set[str]:
    """The modules that import themselves through others."""

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        pending = list(graph[name])
        while pending:
            if (other := pending.pop()) not in seen:
                seen.add(other)
                pending += graph[other]
        return seen

    return {name for name in graph if name in reached(name)}


def test_kernels_import_each_other_in_no_circle() -> None:
    found = {name: imports(path, True) for name, path in modules().items() if is_within(name, "kernels")}
    assert not on_a_circle({name: {other for other in imported if other in found} for name, imported in found.items()})
    assert on_a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kernels", ("torch", "triton")),
        ("kernels.backend", ("triton", "transformers")),
        ("kernels.choice", ("triton", "transformers", "kernels.cpu", "kernels.gpu", "kernels.reference")),
        ("kernels.gpu.tuning", ("torch", "triton")),
        ("server.engine.client", ("torch", "transformers", "fastapi")),
        ("server.api.app", ("torch", "transformers")),
        ("server.__main__", ("torch", "transformers", "fastapi")),
    ],
)
def test_importing_brings_in_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    loaded = run_python(f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])")
    assert loaded == "[]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_a_machine_without_a_gpu_does_not_wait_for_triton() -> None:
    code = "import sys; from kernels.backend import BackendOptions; from kernels.choice import create_backend"
    code += "; create_backend('auto', BackendOptions(num_threads=1)); print('triton' in sys.modules)"
    assert run_python(code) == "False"


def test_transformers_does_not_take_our_kernels_for_the_hub_package() -> None:
    """Hugging Face publishes a package named `kernels` too; transformers must find neither it nor its version in ours."""
    assert not hasattr(__import__("kernels"), "__version__")
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code) == "False"
