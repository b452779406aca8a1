"""transformers beside mimo-jax: the same weights in its own format, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mimo_jax import checkpoint
from mimo_jax.config import MiMoConfig


class Transformers:
    """A process that runs scripts/bench_transformers.py.

    Attributes:
      info: its first line: versions, default number of threads, implementations chosen.

    Raises:
      RuntimeError: the process ended; it has said why on standard error.
    """

    def __init__(self, python: str, folder: Path, device: str, dtype: str = "float32"):
        script = Path(__file__).with_name("bench_transformers.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder), device, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.info = self._read()

    def generate(
        self, dtype: str, threads: int, prompts: list[list[int]], tokens: int
    ) -> dict[str, Any]:
        """Generates greedily; the reply is described in scripts/bench_transformers.py."""
        assert self._process.stdin is not None
        request = {"dtype": dtype, "threads": threads, "prompts": prompts, "tokens": tokens}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"bench_transformers.py ended with status {self._process.wait()}; its error is "
                "above.  It needs torch and transformers 5.23 or later"
            )
        return json.loads(line)


def native_config(config: MiMoConfig) -> dict[str, Any]:
    """config.json in the keys that transformers' own class reads; it ignores the hub's.

    Raises:
      ValueError: its class cannot compute this model.
    """
    wanted = {
        "swa_num_key_value_heads": 2 * config.num_key_value_heads,
        "swa_num_attention_heads": config.num_attention_heads,
        "swa_head_dim": config.head_dim,
        "swa_v_head_dim": config.v_head_dim,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise ValueError(f"transformers computes only {key}={value}, found another value")
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "v_head_dim", "max_position_embeddings"),
        *("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "norm_topk_prob"),
        *("attention_value_scale", "sliding_window", "dtype"),
    )
    kinds = {"full": "full_attention", "sliding": "sliding_attention"}
    thetas = {"full": config.rope_theta, "sliding": config.swa_rope_theta}
    return {
        **{key: getattr(config, key) for key in same},
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "rms_norm_eps": config.layernorm_epsilon,
        "routed_scaling_factor": config.routed_scaling_factor or 1.0,
        "tie_word_embeddings": False,
        "layer_types": [kinds[layer.kind] for layer in config.layers],
        "mlp_layer_types": ["sparse" if layer.moe else "dense" for layer in config.layers],
        "rope_parameters": {
            kinds[kind]: {
                "rope_type": "default",
                "rope_theta": theta,
                "partial_rotary_factor": config.partial_rotary_factor,
            }
            for kind, theta in thetas.items()
        },
        # No eos_token_id: generation is to go on for a given number of tokens.
    }


def export(model: str, folder: Path) -> None:
    """Writes a model's backbone, dense and in float32, so that transformers' class reads it."""
    loaded = checkpoint.load(
        checkpoint.resolve(model), dtype="float32", dequantize=True, mtp=False, drafter=False
    )
    checkpoint.save(folder, loaded, layout="split")
    (folder / "config.json").write_text(json.dumps(native_config(loaded.config), indent=2))


@contextlib.contextmanager
def transformers_beside(python: str, model: str, device: str) -> Iterator[Transformers]:
    """transformers with the weights of `model`, run by the interpreter `python` on "cpu" or "cuda".

    Raises:
      ValueError: transformers' class cannot compute this model.
    """
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder))
        process = Transformers(python, Path(folder), device)
        try:
            yield process
        finally:
            process.close()
