"""The corpus of mimo-tiny: Python's standard library, its split, its tokenizer, and xz's result.

The corpus is every .py file of the running interpreter's standard library, tests included.  A file
belongs to the held-out part when the CRC of its path says so, so the split is the same everywhere
and no file is in both parts.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HELD_OUT_EVERY = 20
VOCAB_SIZE = 4096
# MiMo's special tokens in the order of their ids (MODEL_SPEC 6).
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|audio_pad|>",
    "<|mimo_audio_start|>",
    "<|mimo_audio_end|>",
)
# Ids above the tokenizer's, as in the releases; the first one is the drafter's mask token.
PADDING_IDS = 16

# Qwen2's pre-tokenisation: contractions, words, single digits, punctuation, line ends, blanks.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
<think>{{ message.reasoning_content or '' }}</think>
{%- endif -%}
{{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking -%}
<think></think>
{%- endif -%}
{%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Source texts by path relative to the standard library."""

    train: dict[str, str]
    held_out: dict[str, str]


def read_corpus(root: Path | None = None) -> Corpus:
    """Reads and splits the standard library; `root` replaces the running interpreter's."""
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train, held_out = {}, {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few of the tests' files are meant to be undecodable
        if text:
            part = held_out if zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0 else train
            part[name] = text
    return Corpus(train, held_out)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE with MiMo's special tokens at the end of its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - PADDING_IDS - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, the chat template and generation_config."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {t: tokenizer.token_to_id(t) for t in SPECIAL_TOKENS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "temperature": 1.0,
        "top_p": 0.95,
        "do_sample": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one uint16 stream; <|endoftext|> stands before each text and at the end."""
    eot = tokenizer.token_to_id("<|endoftext|>")
    parts = [[eot, *encoding.ids] for encoding in tokenizer.encode_batch_fast(list(texts))]
    return np.asarray([t for part in parts for t in part] + [eot], dtype=np.uint16)


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """Bits a byte of `xz -9e` compressing each text on its own."""
    raw = [t.encode() for t in texts]
    compressed = sum(len(lzma.compress(r, preset=9 | lzma.PRESET_EXTREME)) for r in raw)
    return 8 * compressed / sum(map(len, raw))
