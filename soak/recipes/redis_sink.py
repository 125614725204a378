# SPDX-License-Identifier: MIT
"""Batches into a Redis stream. Needs redis (redis-py) and tenacity.

From one machine to many: consumer groups on the stream (XREADGROUP, XACK); on Redis Cluster (``redis.RedisCluster``) a
stream a partition, such as ``events:{7}`` for the seventh, and a sink for each.
"""

import threading
import uuid
from typing import Any

import redis
import tenacity
from redis import exceptions

import tempo

Client = redis.Redis | redis.RedisCluster
LASTING = (redis.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
"""What another try does not mend; all else is tried again. (A cluster's errors are not all RedisErrors.)"""


class RedisSink:
    """Appends each event to a stream (XADD), a batch in one transaction. Any thread may call it.

    Once: the transaction also sets a key of the sink's to the batch's number, and a batch that is tried again looks
    there first (WATCH). A batch given up after ``patience`` seconds, and delivered again, can come twice. The stream is
    trimmed to about ``maxlen`` events; None keeps all.
    """

    def __init__(
        self, client: Client, stream: str = "tempo", *, maxlen: int | None = 1_000_000, patience: float = 60.0
    ) -> None:
        """client: with ``socket_timeout`` and ``socket_connect_timeout``: otherwise it waits for a hung server."""
        self._client, self._stream, self._maxlen = client, stream, maxlen
        slot = stream if "{" in stream else "{" + stream + "}"  # of a cluster: where the stream is
        self._mark = f"{slot}:source:{uuid.uuid4().hex}"
        self._number = 0
        self._lock = threading.Lock()
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((redis.RedisError, redis.RedisClusterException))
            & tenacity.retry_if_not_exception_type(LASTING),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
            stop=tenacity.stop_after_delay(patience),
            reraise=True,
        )

    def deliver(self, batch: tempo.Batch) -> None:
        """Append a batch; return when Redis has it. Raises redis.RedisError."""
        with self._lock:
            self._number += 1
            self._retrying(self._append, self._number, batch.tolist())

    def _append(self, number: int, payloads: list[bytes]) -> None:
        pipe: Any  # before MULTI, get() answers at once: its type does not say so
        with self._client.pipeline(transaction=True) as pipe:
            pipe.watch(self._mark)
            if int(pipe.get(self._mark) or 0) >= number:
                return  # an earlier try had arrived
            pipe.multi()
            for payload in payloads:
                pipe.xadd(self._stream, {"event": payload}, maxlen=self._maxlen, approximate=True)
            pipe.set(self._mark, number, ex=7 * 24 * 3600)
            pipe.execute()

    def close(self) -> None:
        self._client.close()
