"""One quantization from SOURCE to OUT: what `awq-quantize` does once its arguments are parsed."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import kernels.format
import kernels.packed_formats
from quantizer import device, estimate, export, html_report, sources
from quantizer.calibration_text import calibration_tokens
from quantizer.checks import check_divisible, check_names
from quantizer.config import QuantizeError, QuantizeOptions
from quantizer.files import files_digest, num_bytes, read_entries, tensor_digest
from quantizer.layouts import quantization_json
from quantizer.mappings import Architecture, find_architecture
from quantizer.pipeline import LayerQuantizer, cast_checked
from quantizer.sources import Source
from quantizer.work_folder import WorkFolder, is_begun


@dataclass(frozen=True, slots=True)
class Job:
    """A source that was found fit to be quantized as asked. shapes: of every tensor of the dense model."""

    source: Source
    architecture: Architecture
    options: QuantizeOptions
    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    tokens: Tensor
    device: torch.device

    @property
    def num_layers(self) -> int:
        return int(self.source.config.num_hidden_layers)

    def linears(self) -> list[str]:
        """Full names of the decoder layers' linears."""
        architecture, config = self.architecture, self.source.config
        return [
            f"{architecture.layer_prefix(index)}{name}"
            for index in range(self.num_layers)
            for name in architecture.layer_linears(config, index)
        ]

    def estimate(self) -> estimate.Estimate:
        """Of the whole run, by a matmul timed here."""
        return estimate.estimate(
            self.architecture,
            self.options,
            self.shapes,
            self.source.config,
            self.tokens.shape[0],
            estimate.measured_rate(self.device),
            estimate.measured_launch(self.device),
            on_host=self.device == device.CPU,
        )

    def fingerprint(self) -> dict[str, Any]:
        """All that the written bytes depend on."""
        return {
            "source": {"name": self.source.description, "sha256": files_digest(self.source.weight_files())},
            "options": self.options.to_dict(),
            "calibration": {"sha256": tensor_digest(self.tokens)},
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {**versions(), "device": device.describe(self.device)},
        }


def prepare(source: Source, options: QuantizeOptions) -> Job:
    """Checks everything that can be checked before the first layer, and draws the calibration tokens."""
    chosen = device.find_device(options.device)
    # Which of several equal devices it was does not matter to who goes on.
    options, architecture = replace(options.resolved(), device=chosen.type), find_architecture(source.config)
    if routers := architecture.routers(source.config):
        options = replace(options, modules_to_not_convert=(*options.modules_to_not_convert, *routers))
    assert options.samples is not None
    check_names(architecture, options, source.config)
    shapes = sources.check_tensors(source)
    check_divisible(architecture, options, shapes, source.config)
    dtype = source.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if dtype not in (torch.float16, torch.bfloat16):
        dtype = torch.float16
    vocabulary = shapes[f"{architecture.embedding}.weight"][0]
    tokens = calibration_tokens(
        source.tokenizer(), vocabulary, options.calibration, options.samples, options.sequence_length, options.seed
    )
    largest = int(tokens.max())
    if largest >= vocabulary:
        raise QuantizeError(
            f"{source.description}: the tokenizer gives token {largest}, but the model has {vocabulary}; is it another model's?"
        )
    return Job(source, architecture, options, shapes, dtype, tokens, chosen)


@device.full_precision()
def quantize(
    source_name: str,
    out: Path,
    options: QuantizeOptions,
    *,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    memory_check: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Quantizes SOURCE into OUT and returns the report that was written. QuantizeError for what the user can mend.

    Stopped at any moment, the same call goes on at the next layer and writes the same bytes (but for times in the report).
    """
    started = time.monotonic()
    if not is_begun(out):
        export.check_output(out, overwrite)
    job = prepare(sources.open_source(source_name, revision, offline), options)
    needed = job.estimate()
    if memory_check:
        available, free_disk = estimate.available_memory(), estimate.free_disk_bytes(out)
        estimate.check_fits(needed, available, free_disk, out.absolute().parent, device.free_memory(job.device))
    if progress:
        print(f"will take {estimate.describe(needed)}", file=sys.stderr)
    fingerprint = job.fingerprint()
    with WorkFolder(out, fingerprint, restart) as work:
        if export.is_published(work, out):
            work.remove()
            report: dict[str, Any] = json.loads((out / export.REPORT_FILE).read_text())
            return report
        export.check_output(out, overwrite)
        seconds_before = sum(layer["seconds"] for layer in work.reports())
        for name, shape in job.shapes.items():
            if not name.startswith(f"{job.architecture.layers}.") and not work.has_tensor(name):
                work.add_tensor(name, cast_checked(name, sources.load_checked(job.source, name, shape), job.dtype))
        _quantize_layers(job, work, progress)
        report = {
            "command": html_report.command(source_name, job.options, revision),
            **fingerprint,
            "architecture": job.architecture.name,
            "calibration_tokens": job.tokens.numel(),
            "seconds": round(time.monotonic() - started + seconds_before, 1),
            "estimate": needed.to_dict(),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_memory_bytes": device.peak_memory(job.device),
            "bytes": sum(num_bytes(*entry) for path in work.parts() for entry in read_entries(path).values()),
            "layers": work.reports(),
        }
        config = export.checkpoint_config(job.source, quantization_json(job.options, job.linears()), job.dtype)
        folder = export.assemble(work, job.source, config, report, job.options.max_shard_bytes)
        export.publish(work, folder, out, overwrite)
    return report


def _quantize_layers(job: Job, work: WorkFolder, progress: bool) -> None:
    first = work.num_layers
    if first == job.num_layers:
        return
    quantizer = LayerQuantizer(job.source, job.architecture, job.options, job.shapes, job.dtype, job.device)
    hidden = work.hidden(first) if first else quantizer.embed(job.tokens)
    with tqdm(total=job.num_layers, initial=first, desc="quantizing", unit="layer", disable=not progress) as bar:
        for result in quantizer.layers(hidden, first):
            report = result.report
            work.add_layer(report.layer, result.tensors, report.to_dict(), result.hidden)
            bar.set_postfix_str(f"error {report.error:.2e} (nearest {report.error_nearest:.2e})")
            bar.update()


def versions() -> dict[str, Any]:
    """What the written integers depend on besides the source and the options: libraries, threads, the CPU's instructions and
    this package's own code."""
    import transformers

    code = [
        *sorted(Path(__file__).parent.glob("*.py")),
        *map(Path, (kernels.format.__file__, kernels.packed_formats.__file__)),
    ]
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "code": hashlib.sha256(files_digest(code).encode()).hexdigest()[:16],
    }
