"""Ten thousand requests take no more memory than two thousand, but for a little each.

SHORT_REQUESTS in the environment is how many, in place of ten thousand.
"""

import os
import random
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from endurance.batches import Job, lasting, random_tokens, write_requests

REQUESTS = int(os.environ.get("SHORT_REQUESTS", "10000"))
PARTS = 5
# Of the resident set, between the first part of the requests and the last one: 2 KB for each of ten
# thousand.  What is remembered of one took 0.3 KB (2.4 MiB in all, on two cores).
GROWTH = 16 * 1024 * 1024
# What a thread that first allocates late may take from the system, once (17 MiB was seen).
ARENAS = 64 * 1024 * 1024
POLL = 0.1


def short_requests(count: int) -> list[dict[str, object]]:
    rng = random.Random(count)
    return [
        {
            "token_ids": random_tokens(rng, 12),
            "max_tokens": rng.randint(2, 4),
            "ignore_eos": True,
        }
        for _ in range(count)
    ]


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 if it has ended."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(sizes[0]) * 1024 if sizes else 0


def sampled(job: Job) -> list[tuple[int, int]]:
    """Runs a job; how many lines it had written, and the memory it had, from time to time."""
    process, samples, lines = job.start(), [], 0
    with job.out.open("ab+") as out:
        out.seek(0)
        while process.poll() is None:
            lines += out.read().count(b"\n")
            samples.append((lines, resident(process.pid)))
            time.sleep(POLL)
    assert process.returncode == 0, job.said()
    return samples


def test_memory_does_not_grow_with_requests(tmp_path):
    source = write_requests(tmp_path / "in.jsonl", short_requests(REQUESTS))
    job = Job(source, tmp_path / "out.jsonl", tmp_path / "cache", ("--batch-size", "16"))
    samples = sampled(job)
    records = lasting(job.out.read_bytes())
    assert [record["line"] for record in records] == list(range(1, REQUESTS + 1))
    assert all(record["finish_reason"] == "length" for record in records)
    parts = [
        [size for lines, size in samples if part < lines * PARTS / REQUESTS <= part + 1]
        for part in range(PARTS)
    ]
    assert min(map(len, parts)) > 9, "the job was too fast to be watched"
    most = [max(part) for part in parts]
    steps = [after - before for before, after in pairwise(most)]
    print(f"from {most[0] / 2**20:.1f} MiB by {[round(step / 2**20, 1) for step in steps]} MiB")
    # What leaks does so in every part; what is taken once is in one of them.
    assert median(steps) * len(steps) < GROWTH
    assert sum(steps) < ARENAS
