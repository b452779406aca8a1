"""Runs what `mimo-jax export` wrote, without mimo-jax.

    python run_exported.py FOLDER --prompt-ids 1,2,3 --tokens 32
    python run_exported.py FOLDER --prompt "import os" --tokens 32

It needs jax, numpy, safetensors and flatbuffers (with which jax reads programs), and for text
tokenizers.  Decoding is greedy.  Completions go to stdout, token ids for --prompt-ids and text for
--prompt; what it did and how fast go to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors import SafetensorError, safe_open

FORMAT, VERSION, MANIFEST = "mimo-jax export", 1, "manifest.json"
NEEDED = ("programs", "arguments", "results", "weights", "platforms", "batch", "cache_len", "model")


class ArtifactError(Exception):
    """A folder can't be run here, or not with this prompt; the message says what to do."""


class RequestError(ArtifactError):
    """What was asked for is more than the folder can do, or nothing."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a run: until the first token, and of each further call; compiling is in both."""

    first: float
    steps: list[float]


class Artifact:
    """An exported model, its weights on the default device.

    Attributes:
      manifest: what manifest.json says.
      batch: rows of a call.

    Raises:
      ArtifactError: the folder is damaged or not an export, or not for this jax or this machine.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.batch: int = self.manifest["batch"]
        self._arguments = self.manifest["arguments"]
        roles = [argument["role"] for argument in self._arguments]
        donated = tuple(i for i, role in enumerate(roles) if role == "cache")
        self._programs = {
            name: jax.jit(self._program(program).call, donate_argnums=donated)
            for name, program in self.manifest["programs"].items()
        }
        self._weights = list(self._read_weights())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        *,
        cache_len: int | None = None,
        ignore_eos: bool = False,
    ) -> tuple[list[list[int]], Timing]:
        """Greedy completions of up to `batch` prompts.

        Args:
          prompts: token ids.
          tokens: most tokens to generate for each.
          cache_len: positions of the cache; by default what is needed, rounded up.
          ignore_eos: go on after an end-of-sequence token.

        Raises:
          RequestError: a prompt is empty, has unknown ids, or is too long.
        """
        lengths = self._check(prompts, tokens)
        cache = self._empty_cache(max(lengths) + tokens, cache_len)
        started = time.perf_counter()
        newest, cache = self._read_prompts(prompts, cache)
        timing = Timing(time.perf_counter() - started, [])
        eos = () if ignore_eos else tuple(self.manifest["model"]["eos_token_ids"])
        rows: list[list[int]] = [[int(newest[row])] for row in range(len(prompts))]
        for step in range(tokens - 1):
            active = np.zeros(self.batch, bool)
            active[: len(rows)] = [row[-1] not in eos for row in rows]
            if not active.any():
                break
            positions = np.zeros(self.batch, np.int32)
            positions[: len(rows)] = lengths
            started = time.perf_counter()
            newest, cache = self._call(
                "step",
                np.where(active, newest, 0)[:, None],
                np.where(active, positions + step, -1)[:, None],
                cache,
            )
            timing.steps.append(time.perf_counter() - started)
            for row, generated in enumerate(rows):
                if active[row]:
                    generated.append(int(newest[row]))
        return rows, timing

    def _read_prompts(
        self, prompts: Sequence[Sequence[int]], cache: list[Any]
    ) -> tuple[np.ndarray, list[Any]]:
        """Reads prompts chunk by chunk; the token after each, and the cache."""
        width = self.manifest["programs"]["prompt"]["tokens"]
        newest = np.zeros(self.batch, np.int32)
        for begin in range(0, max(map(len, prompts)), width):
            tokens = np.zeros((self.batch, width), np.int32)
            positions = np.full((self.batch, width), -1, np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[begin : begin + width]
                tokens[row, : len(part)] = part
                positions[row, : len(part)] = begin + np.arange(len(part))
            chosen, cache = self._call("prompt", tokens, positions, cache)
            newest = np.where(positions[:, 0] >= 0, chosen, newest)
        return newest, cache

    def _call(
        self, program: str, tokens: np.ndarray, positions: np.ndarray, cache: list[Any]
    ) -> tuple[np.ndarray, list[Any]]:
        """A call of a program: the tokens it chose, and the cache."""
        ids = (tokens.astype(np.int32), positions.astype(np.int32))
        chosen, _logits, *cache = self._programs[program](*self._weights, *ids, *cache)
        return np.asarray(chosen), cache

    def _check(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[int]:
        """Lengths of prompts that can be completed by so many tokens."""
        known, most = self.manifest["model"]["valid_vocabulary"], self.manifest["cache_len"]["most"]
        if not 1 <= len(prompts) <= self.batch:
            raise RequestError(f"{len(prompts)} prompts at once: this artifact has {self.batch}")
        if tokens < 1:
            raise RequestError(f"{tokens} tokens to generate: ask for at least one")
        for prompt in prompts:
            if not prompt:
                raise RequestError("a prompt has no tokens: give it at least one")
            wrong = [token for token in prompt if not 0 <= token < known]
            if wrong:
                raise RequestError(f"token id {wrong[0]} isn't one of this model's 0..{known - 1}")
            if len(prompt) + tokens > most:
                raise RequestError(
                    f"a prompt of {len(prompt)} tokens and {tokens} more need a cache of "
                    f"{len(prompt) + tokens} positions, and this artifact's has {most} at most: "
                    "shorten the prompt, ask for fewer tokens, or export with a longer --max-len"
                )
        return [len(prompt) for prompt in prompts]

    def _empty_cache(self, needed: int, asked: int | None) -> list[Any]:
        """A cache for so many positions, of the length asked for if the artifact leaves it open."""
        symbol, most = (self.manifest["cache_len"][key] for key in ("symbol", "most"))
        length = min(most, max(64, 1 << (needed - 1).bit_length())) if asked is None else asked
        if symbol is None:
            length = most
            if asked not in (None, most):
                raise RequestError(f"the cache of this artifact always has {most} positions")
        if not needed <= length <= most:
            raise RequestError(f"the cache has to have {needed} to {most} positions, not {length}")
        return [
            jnp.zeros([length if d == symbol else d for d in a["shape"]], a["dtype"])
            for a in self._arguments
            if a["role"] == "cache"
        ]

    def _program(self, described: dict[str, Any]) -> export.Exported:
        """A program, checked against the manifest and this machine."""
        path = self.folder / described["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} can't be read ({error}): copy the folder again") from None
        if hashlib.sha256(data).hexdigest() != described["sha256"]:
            raise ArtifactError(f"{path} isn't what was exported: copy the folder again")
        try:
            return export.deserialize(bytearray(data))
        except ImportError as error:
            raise ArtifactError(f"jax can't read programs here ({error})") from None
        except Exception as error:  # whatever another version's format leads to
            raise ArtifactError(_other_version(self.manifest, f"{path}: {error}")) from None

    def _read_weights(self) -> Iterator[jax.Array]:
        """The weights in the order of the arguments."""
        path = self.folder / self.manifest["weights"]["file"]
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: copy the folder again")
        try:
            with safe_open(path, framework="np") as file:
                there = set(file.keys())
                for argument in self._arguments:
                    if argument["role"] == "weight":
                        name = argument["name"]
                        array = file.get_tensor(name) if name in there else None
                        yield _checked(array, argument, path)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): copy the folder again") from None


def _checked(array: np.ndarray | None, argument: dict[str, Any], path: Path) -> jax.Array:
    """A tensor as the program wants it."""
    name, dtype = argument["name"], jnp.dtype(argument["dtype"])
    wanted = f"{argument.get('stored', dtype.name)} {argument['shape']}"
    found = "missing" if array is None else f"{array.dtype.name} {list(array.shape)}"
    if array is None or found != wanted:
        raise ArtifactError(
            f"{path}: {name} is {found}, and the programs want {wanted}; it isn't the file that "
            "was exported with them: copy the folder again, or export again"
        )
    return jax.device_put(array.view(dtype))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that this program, this jax and this machine can run.

    Raises:
      ArtifactError: it isn't one.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: give a folder that mimo-jax export wrote, and completed"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read ({error}): copy the folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} isn't of an export of mimo-jax: give a folder that is")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{path} is of version {manifest.get('version')}, and this program reads {VERSION}: "
            "use the run_exported.py of the mimo-jax that exported it, or export again"
        )
    missing = [key for key in NEEDED if key not in manifest]
    if missing:
        raise ArtifactError(f"{path} has no {', '.join(missing)}: copy the folder again")
    least = export.minimum_supported_calling_convention_version
    most = export.maximum_supported_calling_convention_version
    convention = manifest.get("calling_convention_version")
    if not isinstance(convention, int) or not least <= convention <= most:
        reason = f"it has calling convention {convention}, this jax knows {least} to {most}"
        raise ArtifactError(_other_version(manifest, reason))
    here = export.default_export_platform()
    if here not in manifest["platforms"]:
        raise ArtifactError(
            f"this machine's platform is {here}, and {folder} is for "
            f"{', '.join(manifest['platforms'])}: export it with --platforms {here}, or choose one "
            "of them with JAX_PLATFORMS"
        )
    return manifest


def _other_version(manifest: dict[str, Any], reason: str) -> str:
    made = (manifest.get("made_with") or {}).get("jax", "an unknown version")
    return (
        f"jax {jax.__version__} can't read this export of jax {made} ({reason}): install "
        f"jax=={made}, or export again with a version near to this one"
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of the folder.

    Raises:
      ArtifactError: there is none, or the library isn't installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ArtifactError(
            "text needs the package tokenizers: install it, or give --prompt-ids"
        ) from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ArtifactError(f"{folder} has no tokenizer.json: give --prompt-ids")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ArtifactError(f"{path} can't be read ({error}): copy the folder again") from None


def token_ids(text: str) -> list[int]:
    """Token ids from the command line."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ids such as 1,2,3") from None


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Completes prompts with a model that mimo-jax export wrote, greedily."
    )
    parser.add_argument("folder", type=Path)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", metavar="TEXT", help="repeatable")
    prompt.add_argument(
        "--prompt-ids", action="append", type=token_ids, metavar="IDS", help="repeatable"
    )
    parser.add_argument("--tokens", type=int, default=32, help="most to generate [32]")
    parser.add_argument("--cache-len", type=int, help="positions; default: what is needed")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end of sequence")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Completes the prompts, as many at once as the artifact has rows."""
    started = time.perf_counter()
    artifact = Artifact(args.folder)
    tokenizer, prompts = None, args.prompt_ids
    if prompts is None:
        tokenizer = load_tokenizer(args.folder)
        prompts = [tokenizer.encode(text).ids for text in args.prompt]
    device, name = jax.devices()[0], artifact.manifest["model"]["name"]
    seconds = time.perf_counter() - started
    print(f"{name} on {device.device_kind}, loaded in {seconds:.2f} s", file=sys.stderr)
    for first in range(0, len(prompts), artifact.batch):
        rows, timing = artifact.generate(
            prompts[first : first + artifact.batch],
            args.tokens,
            cache_len=args.cache_len,
            ignore_eos=args.ignore_eos,
        )
        for row in rows:
            print(",".join(map(str, row)) if tokenizer is None else tokenizer.decode(row))
        steps = timing.steps[1:]  # the first is compiled
        rate = f", then {np.median(steps) * 1e3:.2f} ms a step" if steps else ""
        print(f"first token after {timing.first:.2f} s with compiling{rate}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    args = parsed(argv)
    try:
        run(args)
        sys.stdout.flush()
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, RequestError) else 1
    except jax.errors.JaxRuntimeError as error:  # such as of too little memory
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
