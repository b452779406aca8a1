"""Files of requests for the tests."""

import gzip
import json
from pathlib import Path
from typing import Any

from mimo_jax.engine.requests import Failure, Request, read_requests


def write(path: Path, lines: list[Any], pack: bool = False) -> Path:
    """Writes lines, which are text or what JSON can hold."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    content = ("\n".join(text) + "\n").encode()
    path.write_bytes(gzip.compress(content) if pack else content)
    return path


def read(tmp_path: Path, *lines: Any, **defaults: Any) -> tuple[list[Request], list[Failure]]:
    """What reading a file of these lines gives."""
    found = read_requests(write(tmp_path / "in.jsonl", list(lines)), defaults, 0)
    return found.requests, found.failures


def chat(custom_id: Any = "c", /, **body: Any) -> dict[str, Any]:
    """An OpenAI batch line of the chat endpoint."""
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return batch_line(custom_id, "/v1/chat/completions", body)


def text(custom_id: Any = "t", /, **body: Any) -> dict[str, Any]:
    """An OpenAI batch line of the completions endpoint."""
    return batch_line(custom_id, "/v1/completions", {"prompt": "import os\n", **body})


def batch_line(custom_id: Any, url: str, body: Any) -> dict[str, Any]:
    """An OpenAI batch line."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
