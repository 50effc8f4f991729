"""Work that does not fit into one process, or had better not take it along when it dies."""
from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

Row = dict[str, object]


def side_by_side(function: Callable[[Row], Row], jobs: Iterable[Row], processes: int) -> Iterator[Row]:
    """``job | function(job)`` of each job, as they come; one process is this one, others are started for it.

    If a process dies, as one whose kernel went wrong may, the row is the job with a ``note`` that says so.
    """
    if processes == 1:
        for job in jobs:
            yield job | function(job)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context('spawn')) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        for future in as_completed(futures):
            died = future.exception()
            yield futures[future] | (dict(note=f'failed: {type(died).__name__}') if died else future.result())
