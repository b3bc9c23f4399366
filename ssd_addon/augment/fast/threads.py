"""Work on several parts of a batch side by side, on as many threads as torch uses inside one operation.

Small operations in a row gain little from threads inside each: they wait for one another after every one. Here each
thread takes whole parts through all of them, one thread to an operation.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""By process, as a forked one has no threads, and number of threads."""
_LOCK = threading.Lock()


def for_each(work: Callable[[T], None], parts: Iterable[T]) -> None:
    """Run `work` on every part; the first error is raised when all have ended."""
    todo = list(parts)
    threads = min(torch.get_num_threads(), len(todo))
    if threads < 2:
        for part in todo:
            work(part)
        return
    default = torch.get_default_dtype()
    assert default == torch.float32  # which threads share; set by the caller

    def run(part: T) -> None:
        with torch.no_grad():  # which each thread has for itself
            work(part)

    running = [_pool().submit(run, part) for part in todo]
    for each in running:
        each.exception()
    for each in running:
        each.result()


def _pool() -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    key = (os.getpid(), threads)
    with _LOCK:
        if key not in _POOLS:
            for pool in _POOLS.values():
                pool.shutdown(wait=False)
            _POOLS.clear()
            ready = threading.Barrier(threads + 1)

            def begin() -> None:
                torch.set_num_threads(1)  # of this thread; sets the process's default too, put back below
                ready.wait()

            made = ThreadPoolExecutor(threads, thread_name_prefix="ssd_addon views", initializer=begin)
            for _ in range(threads):
                made.submit(int)  # a thread each, as all wait in `begin`
            ready.wait()
            torch.set_num_threads(threads)
            _POOLS[key] = made
        return _POOLS[key]
