# SPDX-License-Identifier: MIT
"""A sink that uses an executor (or ``asyncio.run``, which uses one): shut down in the program, not at exit.

As the interpreter ends, executors are closed before any exit hook runs: a drain after that fails with "cannot schedule
new futures after shutdown". So the program closes the dispatcher, then the executor.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import tempo


@contextmanager
def pooled(send_one: Callable[[bytes], object], threads: int = 4, **limits: Any) -> Iterator[tempo.Dispatcher]:
    """Yield a dispatcher whose payloads are sent by a pool of threads; leaving the block waits until all are sent."""
    with ThreadPoolExecutor(threads) as pool, tempo.Dispatcher(**limits) as dispatcher:
        dispatcher.start(lambda batch: list(pool.map(send_one, batch.tolist())))
        yield dispatcher
