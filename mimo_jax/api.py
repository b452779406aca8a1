"""Loading a checkpoint as a model that is ready to generate, and saving it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from mimo_jax import checkpoint
from mimo_jax.checkpoint import Progress
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.language_model import LanguageModel
from mimo_jax.model.packing import use_exchange, use_kernels
from pallas_kernels.backends import Target, resolve
from pallas_kernels.mosaic_tpu import converts_e2m1
from sharding.mesh import all_devices, make_mesh
from sharding.rules import ShardingRules

MTP_BLOCKS = 3  # of all releases (MODEL_SPEC 3.1)
_CACHE_VARIABLE = "MIMO_JAX_COMPILATION_CACHE"


def load(
    name_or_path: str | Path = "mimo-tiny",
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    qkv: str | None = None,
    mesh: str | Mesh | None = None,
    rules: str | ShardingRules = "latency",
    random_weights: int | None = None,
    layers: int | None = None,
    drafters: bool = False,
    kernels: str = "auto",
    progress: Progress | bool | None = None,
) -> LanguageModel:
    """Loads a model, ready to generate.

    On a mesh every device holds, and every process reads, its own part of the weights only.

    Args:
      name_or_path: a bundled name ("mimo-tiny"), a checkpoint folder, or a hub id; with
        `random_weights`, also the name of a configuration (`presets`).
      dtype: compute dtype instead of the config's, such as "float32".
      dequantize: expand FP8 and MXFP4 weights to the compute dtype; they stay quantised otherwise.
      qkv: how fused QKV rows are stored ("interleaved", "plain" or "split"), where the loader's
        own reading of the checkpoint is to be overruled (see `mimo-jax inspect`).
      mesh: devices to split the model over: text such as "expert=2,tensor=4", or a jax Mesh in
        explicit mode.  By default the model is on jax's default device.
      rules: how to split it: a name of `sharding.rules.PRESETS` ("latency": tensor-parallel
        attention and experts; "throughput": data-parallel attention, expert-parallel experts; ...)
        or `ShardingRules` of your own.
      random_weights: a seed; weights are made up on the devices instead of read, in the formats
        that the config announces.
      layers: with `random_weights`, only so many layers.
      drafters: with `random_weights`, MTP blocks and the configuration's DFlash drafter too, whose
        proposals mean nothing.
      kernels: "auto" for those of this device ("triton" and "mosaic_gpu" on NVIDIA GPUs,
        "mosaic_tpu" on TPUs, plain XLA elsewhere and for what they can't do), one of these names
        for that alone, or "reference" for plain XLA.  Quantised weights are repacked for them,
        exactly.
      progress: True for a bar, at a terminal and in a notebook (with ipywidgets); or what is called
        while weights are read, with the bytes read so far and in all.

    Raises:
      FileNotFoundError: nothing has that name; the message names what is close.
      checkpoint.CheckpointError: the checkpoint is damaged or not one of ours; the message lists
        every tensor concerned.
      ConfigError: its config asks for something that is not implemented.
      MeshError: there is no such mesh.
      ShardingError: there are no such rules, or the mesh does not divide the model.
      NotEnoughMemoryError: the weights would not fit; nothing has been allocated.
      NoDevicesError: jax finds no devices of the platforms that JAX_PLATFORMS names.
      BackendError: there are no such kernels, or they don't run here or with these weights.
    """
    on = None if mesh is None else make_mesh(mesh)
    device = all_devices()[0] if on is None else on.devices.flat[0]
    target = Target.of(device)
    backends = resolve(kernels, target)
    if random_weights is None:
        if layers is not None or drafters:
            raise ValueError(
                "layers= and drafters= are of models with random_weights=: give it too"
            )
        folder = checkpoint.resolve(name_or_path)
        enable_compilation_cache()
        with _calls(progress, f"loading {name_or_path}") as call:
            loaded = checkpoint.load(
                folder,
                dtype=dtype,
                dequantize=dequantize,
                qkv=qkv,
                mesh=on,
                rules=rules,
                progress=call,
            )
        return _packed(loaded, backends, target)
    if dequantize or qkv is not None:
        raise ValueError("dequantize= and qkv= are about checkpoints; random_weights= reads none")
    name = checkpoint.bundled().get(str(name_or_path), name_or_path)
    config = MiMoConfig.from_pretrained(name)
    config = config if layers is None else config.truncated(layers)
    drafter = DFlashConfig.from_pretrained(name) if drafters else None
    enable_compilation_cache()
    loaded = checkpoint.random_weights(
        config,
        random_weights,
        mtp_blocks=MTP_BLOCKS if drafters else 0,
        drafter=drafter and drafter.fitted_to(config.num_hidden_layers),
        dtype=dtype,
        mesh=on,
        rules=rules,
    )
    return _packed(loaded, backends, target)


def _calls(
    progress: Progress | bool | None, what: str
) -> contextlib.AbstractContextManager[Progress | None]:
    """What is called while weights are read."""
    if progress is True:
        return checkpoint.progress_bar(what)
    return contextlib.nullcontext(progress or None)


def _packed(loaded: checkpoint.Loaded, backends: Sequence[str], target: Target) -> LanguageModel:
    """The model with its weights repacked for these kernels."""
    native = converts_e2m1(target)
    for module in (loaded.model, loaded.mtp, loaded.drafter):
        if module is not None:
            use_kernels(module, backends, native_e2m1=native)
    if loaded.placement is not None:
        use_exchange(loaded.model, loaded.placement, backends)
    return LanguageModel(loaded)


def save_pretrained(lm: LanguageModel, folder: str | Path) -> None:
    """Writes a model as HF safetensors, with the names, layout and bytes it was loaded with.

    Raises:
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    checkpoint.save(folder, lm.loaded)
    checkpoint.copy_tokenizer(lm.loaded.folder, folder)


def enable_compilation_cache() -> Path | None:
    """Turns on XLA's persistent compilation cache, unless it is configured or disabled already.

    The first call of a process says on stderr where it is.  The environment variable
    MIMO_JAX_COMPILATION_CACHE moves it, or disables it with the value "off".

    Returns:
      The cache's folder, None if this call did not turn it on.
    """
    wanted = os.environ.get(_CACHE_VARIABLE, "")
    if wanted.lower() == "off" or jax.config.jax_compilation_cache_dir:
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(wanted) if wanted else home / "mimo-jax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"no XLA compilation cache: {error} (set {_CACHE_VARIABLE})", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    print(f"XLA compilation cache: {folder} ({_CACHE_VARIABLE}=off disables)", file=sys.stderr)
    return folder
