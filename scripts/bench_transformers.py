"""transformers' side of benchmarks: greedy generation by MiMoV2FlashForCausalLM, timed.

Started by scripts/transformers_beside.py with an interpreter that has torch and transformers, a
folder with a checkpoint (or with a config.json alone: weights are random then), a device and the
dtype of the first request.  Each line of standard input is a request, a JSON object

    {"dtype": "float32", "threads": 2, "prompts": [[1, 2, ...], ...], "tokens": 128}

where `threads` may be null for torch's default and shorter prompts are padded on the left; each
line of standard output is the reply,

    {"seconds": 1.0, "ms_per_token": 1.0, "first_ms": 1.0, "cores": 1.0, "tokens": [[...], ...]}

The first line of output says what runs here: versions, and the implementations that transformers
chose by itself.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, MiMoV2FlashForCausalLM
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when each step's tokens are there: generate() calls `put` with the prompt, then with
    the new tokens of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: Any) -> None:
        """Called with tokens on the host."""
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


@functools.cache
def load(folder: str, dtype: str, device: str) -> Any:
    """The model in `dtype`, every tensor of the checkpoint used; random without one.

    Raises:
      RuntimeError: tensors are missing, left over or of another shape.
    """
    if not any(Path(folder).glob("*.safetensors")):
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            return MiMoV2FlashForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    model, info = MiMoV2FlashForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise RuntimeError(f"the checkpoint does not fit transformers' class: {wrong}")
    return model.to(device).eval()


def run(model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Generates `tokens` greedy tokens after each prompt; the first is timed apart."""
    clock = Clock()
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(p)) + p for p in prompts]
    real = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
    ids, mask = (torch.tensor(x, device=model.device) for x in (padded, real))
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    called, called_cpu = time.perf_counter(), time.process_time()
    out = model.generate(ids, attention_mask=mask, generation_config=config, streamer=clock)
    done, done_cpu = time.perf_counter(), time.process_time()
    first, last = clock.seen[1], clock.seen[-1]
    return {
        "seconds": done - called,
        "ms_per_token": 1000 * (last - first) / (tokens - 1),
        "first_ms": 1000 * (first - called),
        "cores": (done_cpu - called_cpu) / (done - called),
        "tokens": out[:, ids.shape[1] :].tolist(),
    }


def main(folder: str, device: str, dtype: str) -> None:
    """Serves requests until standard input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is not a reply
    transformers.utils.logging.disable_progress_bar()
    default_threads = torch.get_num_threads()
    model = load(folder, dtype, device)
    hello = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "default_threads": default_threads,
        "attention": model.config._attn_implementation,
        "experts": model.config._experts_implementation,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
    }
    print(json.dumps(hello), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"] or default_threads)
        model = load(folder, request["dtype"], device)
        reply = run(model, request["prompts"], request["tokens"])
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
