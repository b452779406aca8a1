"""Rows and their results: who gets which, when a slot is free, and what is refused."""

import pytest
from engine.simulated_device import MAX_LEN, SIZES, make_device

from mimo_jax.engine.actions import Decode, Insert, Job, Prefill, Result
from mimo_jax.engine.lanes import plan_chunks
from mimo_jax.engine.scheduler import Scheduler


def test_rows_that_reach_max_tokens_free_their_slots_at_once():
    """Three completions of 2 x 4 tokens, with no dispatch between them."""

    def decodes(known: bool) -> int:
        device, _ = make_device(slots=1, steps=4)
        if not known:
            device.scheduler._slots.steps = 0
        device.has_eos = False
        for i in range(3):
            device.scheduler.submit(Job(i, (1, 2), 8))
        device.run()
        assert all(len(text) == 8 for text in device.texts.values())
        return sum(isinstance(action, Decode) for action in device.log)

    assert decodes(known=True) == 6
    assert decodes(known=False) > 6


def test_results_that_come_late_are_of_the_earlier_row():
    scheduler = Scheduler(1, 1, MAX_LEN, SIZES, steps=2)
    old, new = Job("old", (1,), 2), Job("new", (2,), 2)
    scheduler.submit(old)
    scheduler.submit(new)
    actions = []
    while (action := scheduler.next()) is not None:
        actions.append(action)
    kinds = [type(action) for action in actions]
    assert kinds == [Prefill, Insert, Prefill]
    assert scheduler.report(actions[0]) == []
    decode = scheduler.next()
    assert isinstance(decode, Decode)
    assert scheduler.report(actions[1]) == []
    insert = scheduler.next()
    assert isinstance(insert, Insert)
    assert (insert.row.slot, insert.row.job) == (0, new)
    scheduler.report(actions[2])
    assert scheduler.report(decode, {0: Result(2, True)}) == [actions[1].row]
    assert scheduler.stats.running == 1


def test_what_the_host_ended_gets_nothing_and_the_device_is_told():
    device, jobs = make_device(
        slots=2, steps=1, prompts=[Job("a", (1,), 30), Job("b", (2,), 30, 2)]
    )
    device.has_eos = False
    while sum(isinstance(action, Decode) for action in device.log) < 2:
        device.step()
    device.end(jobs[0])
    assert device.scheduler.stats.running == 1
    while not isinstance(device.log[-1], Insert):
        device.step()
    # The slot was given on at once, so there is nothing to stop.
    device.end(jobs[1], 0)
    device.step()
    while not (isinstance(device.log[-1], Decode) and device.log[-1].stopped):
        device.step()
    device.run()
    assert not device.scheduler.end("a")
    assert not device.scheduler.end("nobody")
    assert device.finished == {(jobs[1], 1)}


def test_a_key_may_be_used_again_while_old_results_are_under_way():
    device, jobs = make_device(slots=1, steps=1, prompts=[Job("a", (1,), 30)])
    device.has_eos = False
    while not isinstance(device.log[-1] if device.log else None, Decode):
        device.step()
    with pytest.raises(ValueError, match="an unfinished job 'a' already; give it another key"):
        device.scheduler.submit(Job("a", (1,), 1))
    device.end(jobs[0])
    again = Job("a", (1, 2), 30)
    device.scheduler.submit(again)
    device.run()
    assert device.finished == {(again, 0)}


def test_completions_of_one_job_share_the_prefill_and_more_than_slots_are_possible():
    device, jobs = make_device(
        slots=2, lanes=1, prompts=[Job("a", (1, 2, 3), 5, 7), Job("b", (1,), 5)]
    )
    device.run()
    assert device.computed == {jobs[0]: 1, jobs[1]: 1}
    inserts = [a.row for a in device.log if isinstance(a, Insert)]
    assert [(row.job.key, row.index) for row in inserts] == [
        *(("a", i) for i in range(7)),
        ("b", 0),
    ]


def test_chunks_wait_for_company_while_others_are_ready():
    """With all slots busy a lane that becomes free is not filled alone."""
    device, _ = make_device(
        slots=1, lanes=4, steps=1, prefill_batch=4, prompts=[Job(i, (i,), 9) for i in range(13)]
    )
    device.run()
    sizes = [len(action.chunks) for action in device.log if isinstance(action, Prefill)]
    assert sizes == [4, 4, 4, 1]


def test_one_that_comes_while_others_decode_does_not_wait_for_company():
    device, _ = make_device(lanes=4, steps=1, prompts=[Job("long", (1,), 40)])
    device.has_eos = False
    while not (device.log and isinstance(device.log[-1], Decode)):
        device.step()
    device.scheduler.submit(Job("new", (2,), 1))
    device.run()
    decodes = [i for i, action in enumerate(device.log) if isinstance(action, Decode)]
    inserts = [i for i, action in enumerate(device.log) if isinstance(action, Insert)]
    assert inserts[1] < decodes[2]


def test_insertions_do_not_run_ahead_of_the_reports():
    device, _ = make_device(prompts=[Job("a", (1,), 1, 100)])
    while not device.scheduler.idle:
        device.step()
        assert len(device.outputs) <= 4
    assert len(device.finished) == 100


@pytest.mark.parametrize(
    ("length", "chunks"),
    [
        (1, [(2, 0)]),
        (2, [(2, 0)]),
        (3, [(4, 0)]),
        (5, [(8, 0)]),
        (8, [(8, 0)]),
        (9, [(8, 0), (2, 8)]),
        (16, [(8, 0), (8, 8)]),
        (23, [(8, 0), (8, 8), (8, 16)]),
    ],
)
def test_how_a_prompt_is_cut(length, chunks):
    assert plan_chunks(length, SIZES) == chunks


@pytest.mark.parametrize(
    ("length", "max_tokens", "granted"),
    [(MAX_LEN - 1, 1, 1), (MAX_LEN - 1, 100, 1), (1, 100, MAX_LEN - 1), (1, 3, 3)],
)
def test_max_tokens_are_clipped_to_the_cache(length, max_tokens, granted):
    device, _ = make_device()
    job = Job("a", (1,) * length, max_tokens)
    assert device.scheduler.submit(job) == granted
    device.run()
    assert device.finished == {(job, 0)}


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("a", (), 1), "the prompt has no tokens"),
        (Job("a", (1,) * MAX_LEN, 1), "48 tokens, which leaves no room .* max_len of 48; shorten"),
        (Job("a", (1,), 0), "max_tokens is 0, n is 1"),
        (Job("a", (1,), 1, 0), "n is 0"),
    ],
)
def test_jobs_that_are_refused(job, message):
    device, _ = make_device()
    with pytest.raises(ValueError, match=message):
        device.scheduler.submit(job)
    assert device.scheduler.idle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots is 0; it must be at least 1"),
        ({"lanes": 0}, "lanes is 0"),
        ({"max_len": 1}, "max_len is 1; it must be at least 2"),
        ({"chunk_sizes": ()}, "give positive ones in ascending order"),
        ({"chunk_sizes": (4, 4)}, "give positive ones in ascending order"),
        ({"chunk_sizes": (0, 4)}, "give positive ones in ascending order"),
        ({"snapshots": -1}, "snapshots is -1"),
        ({"prefill_share": 0}, "prefill_share is 0; it must be positive"),
        ({"in_flight": 0}, "in_flight is 0"),
        ({"lookahead": -1}, "lookahead is -1"),
        ({"prefill_batch": 3}, "prefill_batch is 3; it must be from 1 to 2"),
    ],
)
def test_schedulers_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_device(**options)


def started(max_tokens: int = 9, steps: int = 4):
    """A scheduler with a row, and its unreported insertion."""
    scheduler = Scheduler(1, 1, MAX_LEN, SIZES, steps=steps, in_flight=4)
    scheduler.submit(Job("a", (1,), max_tokens))
    prefill, insert = scheduler.next(), scheduler.next()
    assert isinstance(prefill, Prefill)
    assert isinstance(insert, Insert)
    scheduler.report(prefill)
    return scheduler, insert


def test_reports_that_cannot_be_true():
    scheduler, insert = started()
    decode = scheduler.next()
    assert decode is not None
    with pytest.raises(ValueError, match="report in order"):
        scheduler.report(decode, {0: Result(4, False)})
    scheduler.report(insert)
    with pytest.raises(ValueError, match=r"results of the slots \[1\], but .* rows in \[0\]"):
        scheduler.report(decode, {1: Result(4, False)})
    with pytest.raises(ValueError, match=r"got 3 tokens and goes on, but .* at least 4"):
        scheduler.report(decode, {0: Result(3, False)})

    scheduler, insert = started(max_tokens=1)
    decode = scheduler.next()
    assert decode is not None
    scheduler.report(insert)
    with pytest.raises(ValueError, match="has 1 tokens and goes on; the device must end it with 1"):
        scheduler.report(decode, {0: Result(1, False)})

    scheduler, insert = started(max_tokens=20)
    first, second = scheduler.next(), scheduler.next()
    assert isinstance(first, Decode)
    assert isinstance(second, Decode)
    scheduler.report(insert)
    scheduler.report(first, {0: Result(2, True)})
    with pytest.raises(ValueError, match="got 2 tokens after it had ended"):
        scheduler.report(second, {0: Result(2, True)})
