"""A loaded model: `logits`, `generate` and `stream`, and the engine beneath them."""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float

from mimo_jax import checkpoint, tokenizer
from mimo_jax.config import MiMoConfig
from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.draft_width import at_chance
from mimo_jax.decoding.drafters import DFlashDrafter, Drafter, MTPDrafter
from mimo_jax.decoding.outputs import GenerationOutput, Row, output_of
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.speculative import SpeculativeDecoder, Width
from mimo_jax.decoding.static_batch import bucket, checked_limit
from mimo_jax.engine.loop import Engine, Work
from mimo_jax.model.backbone import MiMo
from sharding import distributed
from sharding.mesh import use
from sharding.types import entries, reshard

Speculative = Literal["mtp", "dflash"] | None
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | np.ndarray

# Prompts that an engine reads at once, and beginnings of prompts that it keeps for others.
LANES = 4
SNAPSHOTS = 2


class AcceptanceWarning(UserWarning):
    """A drafter's proposals are as good as never right."""


class LanguageModel:
    """A loaded model with its tokenizer.

    Attributes:
      config: the model's `MiMoConfig`.
      model: the backbone, a flax.nnx module (a pytree of parameters).
      tokenizer: the Hugging Face tokenizer, None if the checkpoint has none.
      mtp: the multi-token-prediction blocks, if it has any.
      drafter: the DFlash drafter, if it has one.
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
        try:
            ids = np.asarray(token_ids)
        except ValueError:
            raise ValueError("token_ids must be integers [B, T], found rows that differ") from None
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
        more = ((0, -len(ids) % self.decoder.ways), (0, padded - length))
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
        where as many completions are decoded together, with caches as long; in float32 it always
        does.

        Args:
          prompts: one prompt or a list of them, each a string, a list of token ids, or a list of
            chat messages ({"role", "content"}).
          params: sampling parameters, one for all or one a prompt; greedy by default.
          batch_size: completions decoded together; others take the places of those that end.
          max_len: length of the cache, prompt and completion together; by default what is needed.
          speculative: what proposes tokens that the model verifies, several at once: "mtp",
            "dflash" or None.  The tokens are the same (in other shapes arithmetic rounds
            differently, as in other batches).
          draft_width: how many tokens are verified at once, the newest and proposals: a number,
            None for all, or "adaptive".

        Raises:
          TypeError: a prompt is nothing of these, or params are no SamplingParams.
          ValueError: a prompt is empty, malformed, or too long for the model or for max_len,
            batch_size is not positive, or the checkpoint has no such drafter.
        """
        self.decoder_for(speculative, draft_width)  # says so if there is none
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; at least one completion must fit")
        listed = list(_listed(prompts))
        each = _each(params, len(listed))
        if not listed:
            return []
        ids = [self.encode(prompt) for prompt in listed]
        limit = checked_limit(ids, self.config.max_position_embeddings, max_len)
        if max_len is None:
            max_len = self.cache_length(
                max(len(t) + p.max_tokens for t, p in zip(ids, each, strict=True))
            )
        completions = sum(p.n for p in each)
        engine = self.engine(
            batch_size=bucket(completions, batch_size, 1),
            max_len=min(max_len, limit),
            speculative=speculative,
            draft_width=draft_width,
            top_logprobs=max((p.logprobs for p in each if p.logprobs is not None), default=None),
        )
        seeds = [_some_seed() if p.seed is None else p.seed for p in each]
        works = (Work(i, *of) for i, of in enumerate(zip(ids, each, seeds, strict=True)))
        found = {key: output for ended in engine.run(works) for key, output in ended}
        outputs = [found[i] for i in range(len(listed))]
        warn_at_chance(speculative, outputs)
        return outputs

    def engine(
        self,
        *,
        batch_size: int,
        max_len: int,
        speculative: Speculative = None,
        draft_width: Width = None,
        top_logprobs: int | None = None,
    ) -> Engine:
        """Continuous batching with this model: what `generate` and batches of files run on.

        What a request produces depends on nothing but itself and these arguments.

        Args:
          batch_size: completions decoded together, rounded up to what the mesh divides.
          max_len: positions of the cache of each, prompt and completion together.
          speculative: as of `generate`.
          draft_width: as of `generate`.
          top_logprobs: the most that a request asks for; None if none does.

        Raises:
          ValueError: the checkpoint has no such drafter, or max_len exceeds the model's.
          NotEnoughMemoryError: the caches would not fit; nothing has been allocated.
        """
        decoder = self.decoder_for(speculative, draft_width)
        ways = decoder.ways
        slots, lanes = (-(-n // ways) * ways for n in (batch_size, min(batch_size, LANES)))
        snapshots = SNAPSHOTS * (batch_size > 1)
        decoder.check_memory(slots + lanes + snapshots * ways, max_len)  # these aren't split
        return Engine(
            decoder,
            lambda params: Row(params, self.tokenizer, self.eos_ids),
            slots=slots,
            lanes=lanes,
            max_len=max_len,
            snapshots=snapshots,
            top_logprobs=top_logprobs,
        )

    def cache_length(self, tokens: int) -> int:
        """Positions of a cache for so many tokens, prompt and completion together: a power of two,
        so that few programs are compiled, or what the model has."""
        return bucket(tokens, self.config.max_position_embeddings, 256)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        speculative: Speculative = None,
        draft_width: Width = None,
    ) -> Stream:
        """Completes one prompt, yielding text as it becomes certain; `.output` has the rest.

        The prompt is read at once, for the sake of the first token; `generate` reads it in chunks,
        which rounds differently in bfloat16.

        Args:
          prompt: as one of `generate`.
          params: as of `generate`.
          speculative: as of `generate`.
          draft_width: as of `generate`.

        Raises:
          TypeError: the prompt is nothing of these, or params are no SamplingParams.
          ValueError: the prompt is empty, malformed or too long, params.n is not 1, or the
            checkpoint has no such drafter.
        """
        asked = _checked(params)
        if asked.n != 1:
            raise ValueError(f"stream completes a prompt once, found n={asked.n}; use generate")
        decoder = self.decoder_for(speculative, draft_width)
        return Stream(self, self.encode(prompt), asked, decoder)

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
        several = isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, str)
        if not several or not all(isinstance(t, int | np.integer) for t in prompt):
            raise ValueError("the checkpoint has no tokenizer; give prompts as lists of token ids")
        ids = [int(t) for t in prompt]  # pyright: ignore[reportArgumentType]
        if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            found = f"{min(ids)}..{max(ids)}"
            raise ValueError(f"token ids must be in 0..{self.config.vocab_size - 1}, found {found}")
        return ids


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
        self._pieces = self._run(decoder, seed)
        self._started = time.perf_counter()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def _run(self, decoder: Decoder, seed: int) -> Iterator[str]:
        stopped: set[int] = set()
        row = self._row
        for block in decoder.blocks([self._prompt], [row.params], [seed], stopped=stopped):
            if not row.ended and (text := row.take(block, 0)):
                yield text
            if row.ended:
                stopped.add(0)
        if text := row.finish():
            yield text

    @property
    def output(self) -> GenerationOutput:
        """What has been generated so far; complete once the iteration has ended."""
        return output_of(self._prompt, [(self._row, self._started)])


def _checked(params: Any) -> SamplingParams:
    """Sampling parameters, greedy ones for None.

    Raises:
      TypeError: they are something else.
    """
    if params is None:
        return SamplingParams(temperature=0.0)
    if not isinstance(params, SamplingParams):
        raise TypeError(
            f"{params!r} is of type {type(params).__name__}; sampling parameters are "
            "SamplingParams, such as SamplingParams(max_tokens=64)"
        )
    return params


def _each(params: Any, prompts: int) -> list[SamplingParams]:
    """Sampling parameters of each prompt.

    Raises:
      TypeError: they are something else.
      ValueError: there are more or fewer.
    """
    if isinstance(params, str) or not isinstance(params, Sequence):
        return [_checked(params)] * prompts
    if len(params) != prompts:
        raise ValueError(f"{prompts} prompts but {len(params)} SamplingParams; give one each")
    return [_checked(p) for p in params]


def _listed(prompts: Any) -> Sequence[Prompt]:
    """A list of prompts from one prompt or a list of them.

    Raises:
      TypeError: it is neither.
    """
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        return [prompts]
    if prompts and isinstance(prompts[0], int | np.integer | Mapping):
        return [prompts]
    return prompts


def _some_seed() -> int:
    """A seed for a request that has none; the same in every process of a job."""
    return int(distributed.from_leader("a seed", str(secrets.randbits(63))))


def warn_at_chance(speculative: Speculative, outputs: Sequence[GenerationOutput]) -> None:
    """Warns if a drafter's proposals were hardly ever right (`at_chance`)."""
    lengths = [n for o in outputs for n in o.metrics.acceptance_lengths]
    widths = [w for o in outputs for w in o.metrics.draft_widths]
    if speculative is not None and (said := at_chance(speculative, lengths, widths)):
        warnings.warn(said, AcceptanceWarning, stacklevel=3)
