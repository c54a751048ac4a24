"""AutoAWQ 0.2.9 on the same model and the same calibration tokens, to compare checkpoints with: run in an environment of its own.

On a CPU its scale search spoils the weights: the state dict that it means to go back to after each candidate shares its memory
with the weights it changes. Here that one line is mended and nothing else. SOURCE is a folder with safetensors; TOKENS is JSON, a
list of rows of token ids of equal length.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from awq import AutoAWQForCausalLM
from awq.quantize.quantizer import AwqQuantizer
from transformers import PreTrainedTokenizerFast


class MendedQuantizer(AwqQuantizer):
    def _compute_best_scale(
        self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any, **more: Any
    ) -> Any:
        shared = module2inspect.state_dict
        module2inspect.state_dict = lambda: {name: value.clone() for name, value in shared().items()}
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest, **more)
        finally:
            del module2inspect.state_dict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", help="checkpoint folder")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("tokens", type=Path, help="JSON file: rows of token ids")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--no-clip", action="store_true")
    options = parser.parse_args()

    rows = json.loads(options.tokens.read_text())
    model = AutoAWQForCausalLM.from_pretrained(
        options.source, device_map="cpu", safetensors=True, torch_dtype=torch.float32
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.source)
    started, busy = time.monotonic(), time.process_time()
    model.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": options.group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=rows,
        max_calib_samples=len(rows),
        max_calib_seq_len=len(rows[0]),
        apply_clip=not options.no_clip,
        quantizer_cls=MendedQuantizer,
    )
    seconds, processor_seconds = time.monotonic() - started, time.process_time() - busy
    model.save_quantized(options.out)
    tokenizer.save_pretrained(options.out)
    print(json.dumps({"seconds": round(seconds, 1), "processor_seconds": round(processor_seconds, 1)}))


if __name__ == "__main__":
    main()
