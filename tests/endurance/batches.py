"""`mimo-jax batch` in processes of its own, as one runs it, and what it leaves on the disk."""

import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Variables that conftest.py and a developer set for other things than these runs.
_OTHERS = ("JAX_", "XLA_", "MIMO_JAX_")
MALFORMED = 7


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that can be run again and again.

    Attributes:
      source: the requests.
      out: the results.
      cache: a folder for compiled programs, so that only the first attempt compiles.
      options: of `mimo-jax batch`.
      file_size: bytes that a file may have, for the process; None for any.
    """

    source: Path
    out: Path
    cache: Path
    options: tuple[str, ...] = ()
    file_size: int | None = None

    @property
    def log(self) -> Path:
        """What the last attempt said."""
        return self.cache.with_name(f"{self.cache.name}.log")

    def start(self) -> subprocess.Popen[bytes]:
        """Starts an attempt."""
        command = [sys.executable, str(ROOT / "scripts" / "batch_generate.py")]
        command += [str(self.source), str(self.out), "--model", "mimo-tiny", "--preview", "0"]
        kept = {name: v for name, v in os.environ.items() if not name.startswith(_OTHERS)}
        environment = kept | {
            "JAX_PLATFORMS": "cpu",
            "MIMO_JAX_COMPILATION_CACHE": str(self.cache),
            "PYTHONPATH": str(ROOT),
        }
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*command, *self.options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if self.file_size is not None:
            limits = (self.file_size, self.file_size)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
        return process

    def run(self) -> int:
        """Makes an attempt that nothing disturbs, and returns its exit code."""
        return self.start().wait()

    def said(self) -> str:
        """What the last attempt said, on one line."""
        return self.log.read_text(encoding="utf-8").replace("\n", " ")


def write_requests(path: Path, lines: list[Any]) -> Path:
    """Writes lines of JSON, and strings as they are."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def mixed_requests(count: int) -> list[Any]:
    """Lines of all kinds that are soon done, of which MALFORMED are none."""
    rng = random.Random(count)
    lines: list[Any] = [_mixed_request(number, rng) for number in range(count)]
    for number in rng.sample(range(count), MALFORMED):
        lines[number] = rng.choice(['{"id": "broken", ', '{"prompt": 3}', "[1, 2]", '{"id": "x"}'])
    return lines


def _mixed_request(number: int, rng: random.Random) -> dict[str, Any]:
    sampling: dict[str, Any] = {
        "max_tokens": rng.randint(4, rng.choice([8, 12, 40])),
        "temperature": rng.choice([0.0, 1.0]),
    }
    if rng.random() < 0.15:
        sampling["n"] = 2
    messages = [{"role": "user", "content": f"What is {number} + {rng.randint(1, 99)}?"}]
    match rng.choice(["prompt", "token_ids", "messages", "openai"]):
        case "prompt":
            return {"prompt": f"import os\n# Größe {number}\n", **sampling}
        case "token_ids":
            return {"token_ids": random_tokens(rng, 40), **sampling}
        case "messages":
            return {"id": f"chat-{number}", "messages": messages, **sampling}
    return {
        "custom_id": f"openai-{number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, **sampling},
    }


def random_tokens(rng: random.Random, most: int) -> list[int]:
    """Between one and `most` token ids, none of them special."""
    return [rng.randrange(3, 500) for _ in range(rng.randint(1, most))]


def whole_lines(out: Path) -> bytes:
    """What a file has up to the last end of a line; nothing if it isn't there."""
    data = out.read_bytes() if out.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def lasting(data: bytes) -> list[dict[str, Any]]:
    """The records of whole lines, without what differs from run to run, by line of the input."""
    records = [json.loads(line) for line in data.splitlines()]
    for record in records:
        record.pop("metrics", None)
        if record.get("response"):
            del record["response"]["body"]["created"]
    return sorted(records, key=lambda record: record["line"])
