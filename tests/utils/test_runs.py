"""Jobs start in their order, when what they need is done and a place is free."""
from __future__ import annotations

from concurrent.futures import Future

import pytest

from adala_mm.utils.runs import Job, work_off


class Pool:
    """Starts jobs, and ends them when it is told to."""

    def __init__(self) -> None:
        self.futures: dict[str, Future] = {}

    def submit(self, job: Job) -> Future:
        self.futures[job.name] = Future()
        return self.futures[job.name]


def test_order_places_and_failures():
    pool = Pool()
    jobs = [Job('last', ('c', 'd')), Job('a', threads=2), Job('b'), Job('c', ('a',)), Job('d', ('a',)),
            Job('wide', threads=5), Job('e', ('d',)), Job('f', ('e',))]
    seen = []
    for job in work_off(jobs, pool.submit, places=2, interval=0):
        if job:
            seen.append((job.name, job.state))
            continue
        running = [other.name for other in jobs if other.state == 'running']  # nothing else can start
        seen.append(running)
        future = pool.futures[running[0]]
        if running[0] == 'd':
            future.set_exception(ValueError('it says why'))
        else:
            future.set_result(running[0].upper())
    assert seen == [
        ('a', 'running'), ['a'], ('a', 'done'),
        ('b', 'running'), ('c', 'running'), ['b', 'c'], ('b', 'done'),
        ('d', 'running'), ['c', 'd'], ('c', 'done'), ['d'], ('d', 'failed'),
        ('last', 'skipped'), ('wide', 'running'),  # alone, for it asks for more places than there are
        ('e', 'skipped'), ('f', 'skipped'), ['wide'], ('wide', 'done')]
    results = {job.name: job.future.result() for job in jobs if job.state == 'done'}
    assert results == dict(a='A', b='B', c='C', wide='WIDE')


def test_the_caller_may_say_that_a_job_has_failed():
    pool = Pool()
    jobs, states = [Job('a'), Job('b', ('a',))], []
    for job in work_off(jobs, pool.submit, places=1, interval=0):
        if job is None:
            pool.futures['a'].set_result(None)
        else:
            job.state = job.state.replace('done', 'failed')
            states.append(job.state)
    assert states == ['running', 'failed', 'skipped'] and list(pool.futures) == ['a']


def test_jobs_that_need_each_other():
    with pytest.raises(ValueError, match='these jobs need each other: a, b'):
        list(work_off([Job('a', ('b',)), Job('b', ('a',))], Pool().submit, places=1))
