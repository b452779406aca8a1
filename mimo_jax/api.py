"""The calls people make: `load` a checkpoint, then `logits`, `generate`, `stream`, and save."""

from __future__ import annotations

import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mimo_jax import checkpoint, tokenizer
from mimo_jax.checkpoint import Progress
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.decoding.autoregressive import Decoder, bucket
from mimo_jax.decoding.draft_width import at_chance
from mimo_jax.decoding.drafters import DFlashDrafter, Drafter, MTPDrafter
from mimo_jax.decoding.outputs import GenerationOutput, Row, output_of
from mimo_jax.decoding.sampling import SamplingParams, sample_seed
from mimo_jax.decoding.speculative import SpeculativeDecoder, Width
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.packing import use_kernels
from pallas_kernels.backends import Target, resolve
from pallas_kernels.mosaic_tpu import converts_e2m1
from sharding import distributed
from sharding.mesh import make_mesh, use
from sharding.rules import ShardingRules
from sharding.types import entries, reshard

Speculative = Literal["mtp", "dflash"] | None
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | np.ndarray

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
    progress: Progress | None = None,
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
      progress: called while weights are read, with the bytes read so far and in all.

    Raises:
      FileNotFoundError: nothing has that name; the message names what is close.
      checkpoint.CheckpointError: the checkpoint is damaged or not one of ours; the message lists
        every tensor concerned.
      ConfigError: its config asks for something that is not implemented.
      MeshError, ShardingError: there is no such mesh, or it does not divide the model.
      NotEnoughMemoryError: the weights would not fit; nothing has been allocated.
      BackendError: there are no such kernels, or they don't run here or with these weights.
    """
    on = None if mesh is None else make_mesh(mesh)
    device = jax.devices()[0] if on is None else on.devices.flat[0]
    target = Target.of(device)
    backends = resolve(kernels, target)
    if random_weights is None:
        if layers is not None or drafters:
            raise ValueError(
                "layers= and drafters= are of models with random_weights=: give it too"
            )
        folder = checkpoint.resolve(name_or_path)
        enable_compilation_cache()
        loaded = checkpoint.load(
            folder,
            dtype=dtype,
            dequantize=dequantize,
            qkv=qkv,
            mesh=on,
            rules=rules,
            progress=progress,
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


def _packed(loaded: checkpoint.Loaded, backends: Sequence[str], target: Target) -> LanguageModel:
    """The model with its weights repacked for these kernels."""
    native = converts_e2m1(target)
    for module in (loaded.model, loaded.mtp, loaded.drafter):
        if module is not None:
            use_kernels(module, backends, native_e2m1=native)
    return LanguageModel(loaded)


def save_pretrained(lm: LanguageModel, folder: str | Path) -> None:
    """Writes a model as HF safetensors, with the names, layout and bytes it was loaded with.

    Raises:
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    checkpoint.save(folder, lm.loaded)
    checkpoint.copy_tokenizer(lm.loaded.folder, folder)


class AcceptanceWarning(UserWarning):
    """A drafter's proposals are as good as never right."""


class LanguageModel:
    """A loaded model with its tokenizer.

    Attributes:
      config: the model's `MiMoConfig`.
      model: the backbone, a flax.nnx module (a pytree of parameters).
      tokenizer: the Hugging Face tokenizer, None if the checkpoint has none.
      mtp, drafter: the multi-token-prediction blocks and the DFlash drafter, if it has them.
      mesh: the devices it is split over, None if it is on one.  Calls of `model` by yourself want
        `jax.set_mesh(lm.mesh)` around them.
      loaded: all of the above as the checkpoint package returned it.
    """

    def __init__(self, loaded: checkpoint.Loaded):
        self.loaded = loaded
        self.config: MiMoConfig = loaded.config
        self.model: MiMo = loaded.model
        self.mtp = loaded.mtp
        self.drafter = loaded.drafter
        self.placement = loaded.placement
        self.mesh = None if loaded.placement is None else loaded.placement.mesh
        has_tokenizer = (loaded.folder / "tokenizer.json").is_file() or (
            loaded.folder / "vocab.json"
        ).is_file()
        self.tokenizer: Any = tokenizer.load_tokenizer(loaded.folder) if has_tokenizer else None
        self.eos_ids = tokenizer.eos_ids(loaded.folder, self.config, self.tokenizer)
        valid = self.config.vocab_size
        if self.tokenizer is not None:
            valid = min(valid, tokenizer.valid_vocabulary(self.tokenizer))
        self.decoder = Decoder(
            self.model,
            valid_vocabulary=valid,
            eos_ids=self.eos_ids,
            placement=self.placement,
        )
        self._speculative: dict[tuple[str, Width], SpeculativeDecoder] = {}
        self._forward = jax.jit(_logits)

    def logits(self, token_ids: Any) -> Float[Array, "B T vocab"]:
        """float32 logits at every position of full sequences, without a cache.

        On a mesh they are split over the vocabulary as the head is, and not over the rows.

        Args:
          token_ids: integers [B, T], or anything that numpy makes such an array of.

        Raises:
          ValueError: the ids are not [B, T], are outside the vocabulary, or exceed the model's
            length.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 2 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token_ids must be integers [B, T], found {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"token ids must be in 0..{self.config.vocab_size - 1}, found "
                f"{ids.min()}..{ids.max()}"
            )
        limit, length = self.config.max_position_embeddings, ids.shape[1]
        if length > limit:
            raise ValueError(f"{length} tokens exceed the model's {limit} positions")
        padded = bucket(length, limit)
        ways = 1 if self.placement is None else self.placement.batch_ways
        more = ((0, -len(ids) % ways), (0, padded - length))
        tokens = np.pad(ids, more).astype(np.int32)
        positions = np.where(np.arange(padded) < length, np.arange(padded), -1).astype(np.int32)
        positions = np.broadcast_to(positions, tokens.shape)
        with use(self.mesh):
            logits = self._forward(self.model, self.decoder.put((tokens, positions)))
            return logits[: len(ids), :length]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        batch_size: int = 16,
        max_len: int | None = None,
        speculative: Speculative = None,
        draft_width: Width = None,
    ) -> list[GenerationOutput]:
        """Completes prompts, in order.

        A request's randomness follows from its own seed.  Arithmetic rounds differently in batches
        of different shapes, so that in bfloat16 the same seed is sure to give the same tokens only
        in batches that are padded to the same power of two; in float32 it does in any batch.

        Args:
          prompts: one prompt or a list of them, each a string, a list of token ids, or a list of
            chat messages ({"role", "content"}).
          params: sampling parameters, one for all or one a prompt; greedy by default.
          batch_size: completions decoded together.
          max_len: length of the cache, prompt and completion together; by default what is needed.
          speculative: what proposes tokens that the model verifies, several at once: "mtp",
            "dflash" or None.  The tokens are the same (in other shapes arithmetic rounds
            differently, as in other batches).
          draft_width: how many tokens are verified at once, the newest and proposals: a number,
            None for all, or "adaptive".

        Raises:
          TypeError: a prompt is nothing of these.
          ValueError: a prompt is empty, malformed, or too long for the model or for max_len,
            batch_size is not positive, or the checkpoint has no such drafter.
        """
        decoder = self.decoder_for(speculative, draft_width)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least one completion must fit")
        listed = list(_listed(prompts))
        if params is None:
            params = SamplingParams(temperature=0.0)
        each = [params] * len(listed) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(listed)} prompts but {len(each)} SamplingParams; give one each")
        ids = [self.encode(prompt) for prompt in listed]
        rows = [(i, k) for i, p in enumerate(each) for k in range(p.n)]
        seeds = [_some_seed() if p.seed is None else p.seed for p in each]
        done: list[list[tuple[Row, float]]] = [[] for _ in listed]
        for begin in range(0, len(rows), batch_size):
            part = rows[begin : begin + batch_size]
            batch = [Row(each[i], self.tokenizer, self.eos_ids) for i, _ in part]
            started = time.perf_counter()
            for _ in self._run(
                decoder,
                batch,
                [ids[i] for i, _ in part],
                [sample_seed(seeds[i], k) for i, k in part],
                max_len,
            ):
                pass
            for (i, _), row in zip(part, batch, strict=True):
                done[i].append((row, started))
        outputs = [output_of(ids[i], rows) for i, rows in enumerate(done)]
        _warn_at_chance(speculative, outputs)
        return outputs

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        speculative: Speculative = None,
        draft_width: Width = None,
    ) -> Stream:
        """Completes one prompt, yielding text as it becomes certain; `.output` has the rest.

        Args:
          prompt, params, speculative, draft_width: as of `generate`.

        Raises:
          ValueError: the prompt is empty, malformed or too long, params.n is not 1, or the
            checkpoint has no such drafter.
        """
        params = SamplingParams(temperature=0.0) if params is None else params
        if params.n != 1:
            raise ValueError(f"stream completes a prompt once, found n={params.n}; use generate")
        decoder = self.decoder_for(speculative, draft_width)
        return Stream(self, self.encode(prompt), params, decoder)

    def decoder_for(self, speculative: Speculative = None, draft_width: Width = None) -> Decoder:
        """What `generate` decodes with; the same one for the same options.

        Raises:
          ValueError: the checkpoint has no such drafter, or its blocks are not so wide.
        """
        if speculative is None:
            if draft_width is not None:
                raise ValueError("draft_width= is of speculative decoding; give speculative= too")
            return self.decoder
        key = (speculative, draft_width)
        if key not in self._speculative:
            self._speculative[key] = SpeculativeDecoder(
                self.model,
                self._drafter(speculative),
                valid_vocabulary=self.decoder.valid_vocabulary,
                eos_ids=self.eos_ids,
                placement=self.placement,
                width=draft_width,
            )
        return self._speculative[key]

    @property
    def drafters(self) -> tuple[Literal["mtp", "dflash"], ...]:
        """What `speculative=` can be with this checkpoint."""
        mtp: tuple[Literal["mtp"], ...] = ("mtp",) if self.mtp is not None else ()
        return (*mtp, "dflash") if self.drafter is not None else mtp

    def _drafter(self, name: str) -> Drafter:
        if name == "mtp" and self.mtp is not None:
            return MTPDrafter(self.mtp, self.config)
        if name == "dflash" and self.drafter is not None:
            return DFlashDrafter(self.drafter)
        there = f"it has {' and '.join(self.drafters) or 'none'}"
        raise ValueError(
            f"speculative={name!r}: this checkpoint has no such drafter; {there}"
            if name in ("mtp", "dflash")
            else f'speculative={name!r}: expected "mtp", "dflash" or None'
        )

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt of any kind.

        Raises:
          TypeError: the prompt is nothing of these.
          ValueError: the prompt is malformed, or is text and the checkpoint has no tokenizer.
        """
        if self.tokenizer is not None:
            return tokenizer.encode_prompt(self.tokenizer, prompt)
        if isinstance(prompt, str) or not all(isinstance(t, int | np.integer) for t in prompt):
            raise ValueError("the checkpoint has no tokenizer; give prompts as lists of token ids")
        ids = [int(t) for t in prompt]  # pyright: ignore[reportArgumentType]
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            found = f"{min(ids)}..{max(ids)}"
            raise ValueError(f"token ids must be in 0..{self.config.vocab_size - 1}, found {found}")
        return ids

    def _run(
        self,
        decoder: Decoder,
        batch: list[Row],
        prompts: list[list[int]],
        seeds: list[int],
        max_len: int | None,
    ) -> Iterator[list[str]]:
        """Decodes a batch of rows; yields each row's new text after every block."""
        stopped: set[int] = set()
        blocks = decoder.blocks(
            prompts, [r.params for r in batch], seeds, max_len=max_len, stopped=stopped
        )
        for block in blocks:
            yield ["" if row.ended else row.take(block, i) for i, row in enumerate(batch)]
            stopped.update(i for i, row in enumerate(batch) if row.ended)
        yield [row.finish() for row in batch]


def _logits(model: MiMo, inputs: tuple[Array, Array]) -> Array:
    """Logits of tokens at positions, their rows not split."""
    logits = model(*inputs)[0]
    return reshard(logits, None, None, entries(logits)[2])


class Stream:
    """Text of one completion as it is generated; iterate, then read `output`."""

    def __init__(
        self, lm: LanguageModel, prompt: list[int], params: SamplingParams, decoder: Decoder
    ):
        self._prompt = prompt
        self._row = Row(params, lm.tokenizer, lm.eos_ids)
        seed = _some_seed() if params.seed is None else params.seed
        self._pieces = lm._run(decoder, [self._row], [prompt], [seed], None)
        self._started = time.perf_counter()

    def __iter__(self) -> Iterator[str]:
        for (piece,) in self._pieces:
            if piece:
                yield piece

    @property
    def output(self) -> GenerationOutput:
        """What has been generated so far; complete once the iteration has ended."""
        return output_of(self._prompt, [(self._row, self._started)])


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


def _listed(prompts: Any) -> Sequence[Prompt]:
    """A list of prompts from one prompt or a list of them."""
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int | np.integer | Mapping):
        return [prompts]
    return prompts


def _some_seed() -> int:
    """A seed for a request that has none; the same in every process of a job."""
    return int(distributed.from_leader("a seed", str(secrets.randbits(63))))


def _warn_at_chance(speculative: Speculative, outputs: Sequence[GenerationOutput]) -> None:
    lengths = [n for o in outputs for n in o.metrics.acceptance_lengths]
    widths = [w for o in outputs for w in o.metrics.draft_widths]
    if speculative is not None and (said := at_chance(speculative, lengths, widths)):
        warnings.warn(said, AcceptanceWarning, stacklevel=3)
