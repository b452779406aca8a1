"""Text to token ids and back: the checkpoint's tokenizer, prompts, streamed text, stop strings.

The tokenizer and the chat template are those of the checkpoint folder, run by transformers from
local files, without remote code, and with the template in jinja's sandbox.
"""

from __future__ import annotations

import json
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_jax.config import MiMoConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # importing transformers takes seconds, so only load_tokenizer does

REPLACEMENT = "\ufffd"
# Tokens kept as context by StreamDecoder.  A character has at most 4 bytes and a token at least 1.
CONTEXT_TOKENS = 8


class TokenizerError(ValueError):
    """A file of a checkpoint's tokenizer or of its generation's defaults is damaged."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from its tokenizer.json.

    tokenizer_config.json and chat_template.jinja are used when they are there.  The tokenizer class
    that tokenizer_config.json names is not: those classes rebuild parts of the tokenizer by rules
    of their own, and tokenizer.json says it all.

    Raises:
      FileNotFoundError: the folder has no tokenizer.json.
      TokenizerError: a tokenizer file is damaged.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json (found: {found}); copy the tokenizer files of the "
            "released checkpoint into it"
        )
    tokenizer_class = _import_tokenizer_class()
    try:
        return tokenizer_class.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise TokenizerError(
            f"the tokenizer files in {folder} can't be read ({error}); download them again"
        ) from error


def _import_tokenizer_class() -> Any:
    """transformers' generic tokenizer class, without its remark that torch is not installed."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    return PreTrainedTokenizerFast


def valid_vocabulary(tokenizer: Tokenizer) -> int:
    """One more than the largest id with a tokenizer entry; ids from there on can't be decoded."""
    return max(tokenizer.get_vocab().values()) + 1


def eos_ids(folder: str | Path, config: MiMoConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """All ids that end a sequence, ascending.

    The union of eos_token_id in the folder's generation_config.json (if there is one), in the model
    configuration and in the tokenizer (if there is one): the releases list only some in each.

    Raises:
      TokenizerError: generation_config.json is damaged.
    """
    ids = set(config.eos_token_id)
    if tokenizer is not None and isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    path = Path(folder) / "generation_config.json"
    if path.is_file():
        try:
            listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise TokenizerError(f"{path} is not a JSON object: {error}") from error
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(_is_integer(i) and i >= 0 for i in listed):
            raise TokenizerError(
                f"{path} has eos_token_id {listed}; expected a token id or a list of them"
            )
        ids.update(listed)
    return tuple(sorted(ids))


def encode_prompt(tokenizer: Tokenizer, prompt: Any, chat: bool = False) -> list[int]:
    """The token ids of a prompt.

    Args:
      tokenizer: from `load_tokenizer`.
      prompt: a string; token ids (a sequence or 1-D array of integers), which are passed on; or
        chat messages ({"role": ..., "content": ...} mappings), which go through the chat template
        and end where the assistant's turn begins.
      chat: treat a string as the only message of a user.

    Raises:
      TypeError: the prompt is none of these.
      ValueError: it is empty, an id has no tokenizer entry, or the template can't render it.
    """
    if isinstance(prompt, str):
        ids = (
            _encode_chat(tokenizer, [{"role": "user", "content": prompt}])
            if chat
            else _encode_text(tokenizer, prompt)
        )
    else:
        items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(items, Sequence) or isinstance(items, bytes):
            raise TypeError(
                f"a prompt can't be of type {type(prompt).__name__}; expected a string, a list of "
                "token ids, or a list of chat messages"
            )
        if any(isinstance(item, Mapping) for item in items):
            ids = _encode_chat(tokenizer, items)
        else:
            ids = _check_ids(tokenizer, items)
    if not ids:
        raise ValueError("the prompt is empty; a model needs at least one token to go on from")
    return ids


def _encode_text(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode: {error}") from error
    # Too long a prompt is reported where the cache's length is known.
    return tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)


def _check_ids(tokenizer: Tokenizer, ids: Sequence[Any]) -> list[int]:
    for item in ids:
        if not _is_integer(item):
            raise TypeError(
                f"a prompt holds {item!r} of type {type(item).__name__}; expected a list of token "
                "ids (integers) or of chat messages (mappings)"
            )
    unknown = sorted(int(i) for i in set(ids) if not _has_entry(tokenizer, int(i)))
    if unknown:
        raise ValueError(
            f"the prompt holds token ids that this tokenizer doesn't have: {unknown[:5]}; it has "
            f"ids from 0 to {valid_vocabulary(tokenizer) - 1}"
        )
    return [int(i) for i in ids]


def _has_entry(tokenizer: Tokenizer, token_id: int) -> bool:
    # The library's ids are unsigned 32-bit integers.
    return 0 <= token_id < 2**32 and tokenizer.convert_ids_to_tokens(token_id) is not None


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _encode_chat(tokenizer: Tokenizer, messages: Sequence[Any]) -> list[int]:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"chat message {i} is {message!r}; expected a mapping with a role")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"chat message {i} needs a 'role' that is a string; got {message!r}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f"chat message {i} has no 'content'; got {message!r}")
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(
                f"the 'content' of chat message {i} is of type {type(message['content']).__name__};"
                " expected a string or a list of parts"
            )
    if not tokenizer.chat_template:
        raise ValueError(
            "this tokenizer has no chat template, so it can't take chat messages; give the prompt "
            "as a string, or add the checkpoint's chat_template.jinja to its folder"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program, which can raise anything
        raise ValueError(f"the chat template can't render these messages: {error}") from error
    return _encode_text(tokenizer, str(text), add_special_tokens=False)


class StreamDecoder:
    """Token ids to text while they come; what `push` returned in all, plus `finish`, is the text
    of all ids decoded at once.

    A character whose bytes are not all there yet decodes to one U+FFFD at the very end, so exactly
    that one is held back until the next token shows whether it was one.  Each push decodes a
    bounded number of earlier tokens: UTF-8 resynchronises at every first byte, so that what
    precedes the last character doesn't change how the text goes on.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items() if skip_special_tokens else ()
        self._skipped = frozenset(i for i, token in added if token.special)
        self._ids: list[int] = []  # the latest tokens
        self._sent = 0  # how much of their text has been returned

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes the next tokens and returns the text that is certain now."""
        # Tokens without text must not use up the context.
        self._ids += [
            i for i in token_ids if i not in self._skipped and _has_entry(self._tokenizer, i)
        ]
        text = self._decode()
        certain = len(text.removesuffix(REPLACEMENT))
        new = text[self._sent : certain]
        self._sent = certain
        if len(self._ids) > 2 * CONTEXT_TOKENS:
            self._ids = self._ids[-CONTEXT_TOKENS:]
            self._sent = len(self._decode().removesuffix(REPLACEMENT))
        return new

    def finish(self) -> str:
        """Returns what was held back, and gets ready for another sequence."""
        rest = self._decode()[self._sent :]
        self._ids, self._sent = [], 0
        return rest

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids, clean_up_tokenization_spaces=False))


class StopChecker:
    """Cuts streamed text at the stop string that is complete first (of those, the longest).

    However the text is split into pushes, what `push` returned in all, plus `finish`, is the text
    before that stop string, or all of it when none occurs.

    Attributes:
      matched: the stop string found, or None.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; later text is ignored."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Takes the next text and returns what certainly precedes any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:
            _, at, self.matched = min(found)
            self._held = ""
            return text[:at]
        keep = next(
            n
            for n in range(min(len(text), self._longest), -1, -1)
            if n == 0 or any(s.startswith(text[-n:]) for s in self._stop)
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Returns the text that was held back in case it began a stop string."""
        held, self._held = self._held, ""
        return held
