"""Prompts that begin alike are computed once, and nobody waits for ever."""

import itertools

import pytest
from engine.simulated_device import SIZES, assert_all_is_free, make_device

from mimo_jax.engine.actions import Job, Prefill
from mimo_jax.engine.lanes import Lanes
from mimo_jax.engine.prefixes import Prefixes


def family(first: int, members: int, chunks: int = 3) -> list[tuple[int, ...]]:
    """Prompts that share all but one token."""
    return [(*range(first, first + 8 * chunks), -i) for i in range(1, 1 + members)]


def test_a_shared_prefix_is_computed_once():
    device, jobs = make_device(snapshots=1, lanes=4, prompts=family(0, 20))
    device.run()
    assert device.computed[jobs[0]] == 4
    assert {device.computed[job] for job in jobs[1:]} == {1}
    stats = device.scheduler.stats
    assert (stats.prefix_hits, stats.prefix_tokens) == (19, 19 * 24)


def test_with_one_lane_too():
    device, jobs = make_device(snapshots=1, lanes=1, prompts=family(0, 5))
    device.run()
    assert [device.computed[job] for job in jobs] == [4, 1, 1, 1, 1]


def test_what_is_not_shared_is_not_kept():
    device, _ = make_device(
        snapshots=4, lanes=2, prompts=[family(i, 1)[0] for i in range(0, 2000, 100)]
    )
    device.run()
    assert device.snapshots == 4 * [()]
    assert device.scheduler.stats.prefix_hits == 0


def test_a_prompt_that_is_wholly_a_prefix_still_computes_its_last_chunk():
    whole = tuple(range(16))
    device, jobs = make_device(
        snapshots=2, lanes=1, prompts=[whole, whole, (*whole, 1), (*whole, 2)]
    )
    device.run()
    assert [device.computed[job] for job in jobs] == [2, 1, 1, 1]


def test_families_that_outnumber_the_snapshots_do_not_evict_each_other():
    interleaved = list(itertools.chain(*zip(family(0, 8), family(100, 8), family(200, 8))))
    device, jobs = make_device(snapshots=1, lanes=1, slots=8, prompts=interleaved)
    device.run()
    # The first family has the only snapshot until its last member started; then it is given on.
    assert [device.computed[job] for job in jobs[::3]] == [4, 1, 1, 1, 1, 1, 1, 1]


def test_nested_prefixes_end_with_the_longest():
    short, long = family(0, 1, chunks=2)[0][:-1], family(0, 6, chunks=4)
    device, jobs = make_device(snapshots=1, lanes=1, slots=8, prompts=[(*short, -9), *long])
    device.run()
    assert [device.computed[job] for job in jobs] == [3, 3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("moment", range(12))
def test_another_takes_over_when_the_first_is_ended(moment):
    device, jobs = make_device(snapshots=1, lanes=2, prompts=family(0, 6))
    for _ in range(moment):
        device.step()
    device.end(jobs[0])
    device.run()
    assert device.finished | device.host_ended == {(job, 0) for job in jobs}
    assert sum(device.computed[job] for job in jobs[1:]) <= 4 + 4
    assert_all_is_free(device)


def test_a_waiting_job_is_overtaken_by_as_many_as_are_allowed():
    others = [(100 + i,) for i in range(20)]
    first, second = family(0, 2, chunks=5)
    device, jobs = make_device(
        lanes=2, slots=8, snapshots=1, lookahead=3, prompts=[first, second, *others]
    )
    device.run()
    started = list(
        dict.fromkeys(c.job for a in device.log if isinstance(a, Prefill) for c in a.chunks)
    )
    assert started.index(jobs[1]) == 4
    assert device.computed[jobs[1]] == 1


def test_nobody_waits_for_a_snapshot_that_there_is_no_room_for():
    lanes = Lanes(lanes=2, chunk_sizes=SIZES, snapshots=1, lookahead=5)
    wanted = lanes.prefixes.keys(family(0, 1)[0])
    lanes.prefixes.wait(wanted)
    assert lanes.prefixes.save(wanted, 3) == 0
    for i, prompt in enumerate(family(100, 2)):
        lanes.add(Job(i, prompt, 1))
    lanes.admit()
    assert len(lanes.prefilling) == 2


def test_nobody_looks_further_into_the_queue_than_lookahead():
    lanes = Lanes(lanes=2, chunk_sizes=SIZES, snapshots=1, lookahead=1)
    for i, prompt in enumerate([*family(0, 3), (5,)]):
        lanes.add(Job(i, prompt, 1))
    lanes.admit()
    assert [prompt.job.key for prompt in lanes.prefilling] == [0]


def test_one_dispatch_writes_a_snapshot_once():
    """A lane saves two chunks, another three for the same prompt, into the only snapshot."""
    lanes = Lanes(lanes=2, chunk_sizes=SIZES, snapshots=1, lookahead=5)
    another = lanes.prefixes.keys(family(900, 1)[0])
    lanes.prefixes.wait(another)
    lanes.prefixes.save(another, 3)
    in_first_lane = lanes.add(Job("first", (1,), 1))
    ahead, alike = family(0, 2, chunks=4)
    lanes.add(Job("ahead", ahead, 1))
    lanes.admit()
    lanes.remove(in_first_lane)
    lanes.prefill()
    lanes.add(Job("behind", (*ahead[:16], *range(50, 60)), 1))
    lanes.admit()
    assert [chunk.start for chunk in lanes.prefill().chunks] == [0, 8]
    lanes.add(Job("waits", alike[:25], 1))
    lanes.prefixes.cease_to_wait(another)
    chunks = lanes.prefill().chunks
    assert [(chunk.start, chunk.save_snapshot) for chunk in chunks] == [(8, 0), (16, None)]


def test_what_is_ended_before_its_first_chunk_unpins_its_snapshot():
    lanes = Lanes(lanes=2, chunk_sizes=SIZES, snapshots=1, lookahead=5)
    first, second = (lanes.add(Job(i, prompt, 1)) for i, prompt in enumerate(family(0, 2)))
    lanes.admit()
    for _ in first.chunks[:-1]:
        lanes.prefill()
    lanes.admit()
    assert (second.source, second.done) == (0, 3)
    lanes.remove(second)
    lanes.check()


def test_a_pinned_snapshot_stays():
    prefixes = Prefixes(chunk=2, capacity=1)
    old, new = prefixes.keys([1, 2]), prefixes.keys([3, 4])
    prefixes.wait(old)
    prefixes.save(old, 1)
    prefixes.cease_to_wait(old)
    prefixes.wait(new)
    number = prefixes.pin(old[0])
    assert not prefixes.has_room()
    assert prefixes.save(new, 1) is None
    prefixes.unpin(number)
    assert prefixes.save(new, 1) == number
    assert (prefixes.saved(old), prefixes.saved(new)) == (0, 1)


def test_the_snapshot_that_was_not_used_for_longest_gives_way():
    prefixes = Prefixes(chunk=1, capacity=2)
    a, b, c = (prefixes.keys([token]) for token in range(3))
    for keys in (a, b):
        prefixes.wait(keys)
        prefixes.save(keys, 1)
        prefixes.cease_to_wait(keys)
    prefixes.unpin(prefixes.pin(a[0]))
    prefixes.wait(c)
    assert prefixes.save(c, 1) == 1
    assert [prefixes.saved(keys) for keys in (a, b, c)] == [1, 0, 1]


def test_a_prefix_is_all_that_comes_before():
    prefixes = Prefixes(chunk=2, capacity=1)
    assert len(prefixes.keys([1, 2, 3, 4, 5])) == 2
    assert prefixes.keys([1, 2, 3, 4])[0] == prefixes.keys([1, 2, 7])[0]
    assert prefixes.keys([1, 2, 3, 4])[1] != prefixes.keys([0, 2, 3, 4])[1]
    assert Prefixes(chunk=2, capacity=0).keys([1, 2, 3, 4]) == ()
