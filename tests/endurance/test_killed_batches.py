"""Batches that are killed again and again end with what an undisturbed run writes.

KILLS in the environment is how often, in place of twenty times.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from endurance.batches import (
    MALFORMED,
    Job,
    lasting,
    mixed_requests,
    whole_lines,
    write_requests,
)

KILLS = int(os.environ.get("KILLS", "20"))
REQUESTS = max(100, 15 * KILLS)
# Seconds in which a process starts, reads what is there and loads the model.
STARTING = 8.0
POLL = 0.003


class Killer:
    """Kills attempts at random moments: every fifth while it starts, others while it writes."""

    def __init__(self, job: Job, kills: int):
        self.job, self.left = job, kills
        self.new: list[int] = []  # lines that each attempt had written when it was killed
        self._rng = random.Random(kills)

    def kill_once(self) -> None:
        """Makes an attempt and kills it."""
        before = whole_lines(self.job.out)
        process = self.job.start()
        try:
            if self.left % 5 == 0:
                time.sleep(self._rng.uniform(0, STARTING))
            else:
                self._wait_for_lines(process, before.count(b"\n"))
                time.sleep(self._rng.uniform(0, 0.1))
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL, (
            f"ended before it could be killed: {self.job.said()}"
        )
        self.left -= 1
        after = whole_lines(self.job.out)
        assert after.startswith(before), "lines that were safe are no longer there"
        self.new.append(after.count(b"\n") - before.count(b"\n"))

    def _wait_for_lines(self, process: subprocess.Popen[bytes], before: int) -> None:
        """Waits until the file has some lines more, so few that there are some for each kill."""
        before = max(before, MALFORMED)  # which come at once
        share = (REQUESTS - before) // self.left
        wanted = before + self._rng.randint(1, max(1, share))
        while whole_lines(self.job.out).count(b"\n") < wanted and process.poll() is None:
            time.sleep(POLL)


def tear(out: Path, rng: random.Random, zeros: bool) -> None:
    """Cuts the last line in two, as a kill or, with zeros behind it, a power failure may."""
    data = whole_lines(out)
    begins = data.rfind(b"\n", 0, -1) + 1
    torn = data[: rng.randrange(begins + 1, len(data))]
    out.write_bytes(torn + bytes(len(data) - len(torn) if zeros else 0))


def tear_a_program(cache: Path) -> None:
    """Cuts the largest compiled program in two: jax doesn't write them in one piece."""
    program = max(cache.glob("*-cache"), key=lambda path: path.stat().st_size)
    os.truncate(program, program.stat().st_size // 2)


@pytest.mark.parametrize("options", [(), ("--speculative", "dflash")], ids=["plain", "dflash"])
def test_a_batch_that_is_killed_again_and_again(tmp_path, options):
    source = write_requests(tmp_path / "in.jsonl", mixed_requests(REQUESTS))
    options = ("--batch-size", "16", "--max-tokens", "40", *options)
    job = Job(source, tmp_path / "killed.jsonl", tmp_path / "killed", options)
    killer, rng = Killer(job, KILLS), random.Random(1)
    while killer.left:
        killer.kill_once()
        if killer.left % 4 == 1 and whole_lines(job.out):
            tear(job.out, rng, zeros=killer.left % 8 == 1)
    tear_a_program(job.cache)
    assert sum(new > 0 for new in killer.new) >= KILLS / 2, killer.new
    remaining = REQUESTS - whole_lines(job.out).count(b"\n")
    assert remaining > 0
    assert job.run() == 1, job.said()  # malformed lines have errors

    whole = Job(source, tmp_path / "whole.jsonl", tmp_path / "whole", options)
    assert whole.run() == 1, whole.said()
    found, expected = (lasting(job.out.read_bytes()) for job in (job, whole))
    assert [record["line"] for record in found] == list(range(1, REQUESTS + 1))
    assert sum(record.get("error") is not None for record in found) == MALFORMED
    assert found == expected
    print(f"new lines of each attempt: {killer.new}; of the last: {remaining}")
