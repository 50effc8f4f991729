"""Several runs at a time: which one starts when, and who may work in a folder."""
from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(eq=False)
class Job:
    """One of several runs.

    Args:
        name: no other job has it.
        needs: names of the jobs that must be done before this one starts.
        cost: its share of all work, in any unit.
        threads: how many of the places it takes.
        state: waiting, running, done, failed, or skipped if one that it needs has not been done.
        future: has the result of a job that is done, or the error of one that has failed.
    """

    name: str
    needs: tuple[str, ...] = ()
    cost: float = 1.0
    threads: int = 1
    state: str = 'waiting'
    future: Future | None = field(default=None, repr=False)


def work_off(jobs: Sequence[Job], submit: Callable[[Job], Future], places: int,
             interval: float | None = None) -> Iterator[Job | None]:
    """Starts each job as soon as those that it needs are done and places are free; earlier ones come first.

    Yields a job whenever its state has changed, and None when nothing has for ``interval`` seconds. Between two of them
    the caller may record a result that other jobs need, or set the state of a done job to failed.

    Args:
        submit: starts a job, and returns its future.

    Raises:
        ValueError: if jobs need each other.
    """
    by_name, running = {job.name: job for job in jobs}, []
    while True:
        for job in jobs:
            needed, busy = {by_name[name].state for name in job.needs}, sum(other.threads for other in running)
            if job.state != 'waiting':
                continue
            if needed & {'failed', 'skipped'}:
                job.state = 'skipped'
            elif needed <= {'done'} and (not running or busy + job.threads <= places):
                job.state, job.future = 'running', submit(job)
                running.append(job)
            else:
                continue
            yield job
            break  # what the caller did may change what comes next
        else:
            if not running:
                break
            finished = wait([job.future for job in running], interval, FIRST_COMPLETED).done
            if not finished:
                yield None
            for job in [job for job in running if job.future in finished]:
                running.remove(job)
                job.state = 'failed' if job.future.exception() else 'done'
                yield job
    if stuck := [job.name for job in jobs if job.state == 'waiting']:
        raise ValueError(f'these jobs need each other: {", ".join(stuck)}')


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Holds the lock of a file, for this process and those that inherit the descriptor which this yields.

    Raises:
        RuntimeError: without ``wait``, if somebody else holds it.
    """
    with open(path, 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(f'{path.parent}: another process trains this run; wait for it, or end it') from None
        yield file.fileno()
