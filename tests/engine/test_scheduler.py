"""Continuous batching on a simulated device: nobody starves, nothing leaks, all get their own."""

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
from engine.simulated_device import (
    MAX_LEN,
    SIZES,
    SimulatedDevice,
    assert_all_is_free,
    make_device,
    wanted_cache,
)
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from mimo_jax.engine.actions import Decode, Job, Prefill
from mimo_jax.engine.scheduler import Scheduler


@st.composite
def prompts(draw) -> tuple[int, ...]:
    """Often with a beginning that others have, too: of each chunk there are two."""
    chunks = draw(st.lists(st.integers(0, 1), max_size=4))
    rest = draw(st.lists(st.integers(0, 1), max_size=7))
    tokens = tuple(token for c in chunks for token in 8 * (c,)) + tuple(rest)
    return tokens or (0,)


@st.composite
def sizes_of_schedulers(draw) -> dict:
    lanes = draw(st.integers(1, 4))
    return {
        "slots": draw(st.integers(1, 4)),
        "lanes": lanes,
        "max_len": MAX_LEN,
        "chunk_sizes": draw(st.sampled_from([SIZES, (8,), (3, 8)])),
        "snapshots": draw(st.integers(0, 3)),
        "prefill_share": draw(st.sampled_from([0.5, 1, 3, float("inf")])),
        "prefill_batch": draw(st.none() | st.integers(1, lanes)),
        "in_flight": draw(st.integers(1, 3)),
        "lookahead": draw(st.integers(0, 5)),
    }


class Setting(NamedTuple):
    """What a device is made of.

    It is not made in a strategy, because beartype checks arguments by drawing at random.
    """

    options: dict[str, Any]
    steps: int
    known: bool
    extra: int

    def device(self, jobs: Iterable[Job] = ()) -> SimulatedDevice:
        scheduler = Scheduler(**self.options, steps=self.steps if self.known else 0)
        for job in jobs:
            scheduler.submit(job)
        return SimulatedDevice(scheduler, self.options, self.steps, self.extra)


settings_of_devices = st.builds(
    Setting, sizes_of_schedulers(), st.integers(1, 4), st.booleans(), st.integers(0, 2)
)


many_jobs = st.lists(
    st.tuples(prompts(), st.sampled_from([1, 2, 5, 9, 100]), st.sampled_from([1, 1, 3])),
    max_size=30,
)


def made(setting: Setting, specifications) -> tuple[SimulatedDevice, list[Job]]:
    """A device, and its jobs, which are submitted."""
    jobs = [Job(key, *specification) for key, specification in enumerate(specifications)]
    return setting.device(jobs), jobs


class Machine(RuleBasedStateMachine):
    """Submissions, ends and reports at any moments."""

    @initialize(setting=settings_of_devices)
    def start(self, setting):
        self.device, self.jobs = setting.device(), []

    @precondition(lambda self: not self.device.scheduler.draining)
    @rule(tokens=prompts(), max_tokens=st.sampled_from([1, 2, 5, 9, 100]), n=st.integers(1, 4))
    def submit(self, tokens, max_tokens, n):
        job = Job(len(self.jobs), tokens, max_tokens, n)
        assert self.device.scheduler.submit(job) == min(max_tokens, MAX_LEN - len(tokens))
        self.jobs.append(job)

    @rule(times=st.integers(1, 10))
    def next(self, times):
        for _ in range(times):
            action = self.device.scheduler.next()
            if action is None:
                break
            self.device.execute(action)
        self.device.scheduler.check()

    @rule(times=st.integers(1, 5))
    def report(self, times):
        for _ in range(min(times, len(self.device.outputs))):
            self.device.report()

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def end(self, data):
        job = data.draw(st.sampled_from(self.jobs))
        self.device.end(job, data.draw(st.none() | st.integers(0, job.n - 1)))

    @precondition(lambda self: len(self.jobs) > 5)
    @rule()
    def drain(self):
        started = set(self.device.computed)
        keys = self.device.scheduler.drain()
        for key in keys:
            assert self.jobs[key] not in started
            self.device.host_ended |= {(self.jobs[key], i) for i in range(self.jobs[key].n)}
        assert self.device.scheduler.waiting == 0
        with pytest.raises(RuntimeError, match="after drain"):
            self.device.scheduler.submit(Job("late", (1,), 1))

    @invariant()
    def check(self):
        self.device.scheduler.check()

    def teardown(self):
        if not hasattr(self, "device"):
            return
        self.device.run()
        completions = {(job, i) for job in self.jobs for i in range(job.n)}
        assert self.device.finished | self.device.host_ended == completions
        assert not self.device.finished & self.device.host_ended
        assert_all_is_free(self.device)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestMachine = Machine.TestCase


@given(settings_of_devices, many_jobs)
@settings(max_examples=150)
def test_every_job_gets_its_completions_within_a_bounded_number_of_dispatches(setting, jobs):
    device, jobs = made(setting, jobs)
    device.run()
    assert device.finished == {(job, i) for job in jobs for i in range(job.n)}
    assert_all_is_free(device)
    prefills = sum(isinstance(action, Prefill) for action in device.log)
    decodes = sum(isinstance(action, Decode) for action in device.log)
    assert prefills <= sum(len(wanted_cache(job.tokens, device.sizes)) for job in jobs)
    steps = [-(-(len(text) - 1) // device.steps) for text in device.texts.values()]
    assert decodes <= sum(s + device.scheduler.in_flight for s in steps)


@given(settings_of_devices, many_jobs, st.randoms(use_true_random=False))
def test_what_a_prompt_is_computed_from_does_not_depend_on_when_jobs_come(setting, jobs, chance):
    """The device checks each cache against the chunks that follow from the prompt alone."""
    jobs = [Job(key, *job) for key, job in enumerate(jobs)]
    device = setting.device()
    order = chance.sample(jobs, len(jobs))
    while order or not device.scheduler.idle:
        if order and (device.scheduler.idle or chance.random() < 0.3):
            device.scheduler.submit(order.pop())
        device.step()
    assert device.finished == {(job, i) for job in jobs for i in range(job.n)}
    for name, text in device.texts.items():
        assert text == device.text(*name)


@given(settings_of_devices, many_jobs)
def test_jobs_start_in_the_order_of_arrival_but_for_a_bounded_number(setting, jobs):
    device, jobs = made(setting, jobs)
    scheduler = device.scheduler
    arrival = {job: i for i, job in enumerate(jobs)}
    admitted: list[Job] = []
    while not scheduler.idle:
        device.step()
        now = {prompt.job for prompt in scheduler._lanes._lanes if prompt}
        admitted += sorted(now - set(admitted), key=arrival.__getitem__)
    most = scheduler._lanes.lookahead if device.snapshots else 0
    for i, job in enumerate(admitted):
        assert sum(arrival[other] > arrival[job] for other in admitted[:i]) <= most


@given(settings_of_devices, many_jobs)
def test_lanes_take_turns_and_so_do_prefill_and_decode(setting, jobs):
    device, jobs = made(setting, jobs)
    share = max(1, device.scheduler.prefill_share)
    between, waited = 0, [0] * device.options["lanes"]
    while not device.scheduler.idle:
        before = len(device.log)
        decoding = bool(device.scheduler.stats.running)
        pending = {prompt.lane for prompt in device.scheduler._lanes.prefilling}
        device.step()
        for action in device.log[before:]:
            if isinstance(action, Decode):
                between = 0
            elif isinstance(action, Prefill):
                between += decoding
                assert between <= share
                ran = {chunk.lane for chunk in action.chunks}
                waited = [
                    waited[i] + 1 if i in pending - ran else 0
                    for i in range(device.options["lanes"])
                ]
                assert max(waited) < device.options["lanes"]


def test_many_jobs_leave_nothing_behind():
    device, _ = make_device(slots=8, lanes=4, snapshots=2)
    chance = random.Random(0)
    for i in range(2_000):
        start = chance.choice([0, 100, 200])
        device.scheduler.submit(Job(i, (*range(start, start + 16), i), chance.randint(1, 9)))
        while device.scheduler.waiting > 20:
            device.step()
    device.run()
    assert len(device.finished) == 2_000
    assert_all_is_free(device)
    # Three families, two snapshots.
    assert device.scheduler.stats.prefix_hits > 1_000
