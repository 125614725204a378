# SPDX-License-Identifier: MIT
"""Batches to an HTTP endpoint, a POST each. Needs urllib3 (2)."""

import gzip
import uuid

import urllib3

import tempo


class HttpSink:
    """Posts each batch as NDJSON (an event a line, so without newlines). Any thread may call it.

    At least once: after a timeout, a lost connection, or an answer that may pass, it posts the batch again, with
    backoff (urllib3's Retry, which heeds Retry-After). Each batch has an ``Idempotency-Key``, the same in each try, by
    which a server can drop repeats. Another answer than 2xx, or ``tries`` used up, raises.
    """

    def __init__(
        self,
        url: str,
        *,
        compress: bool = False,
        timeout: float = 10.0,
        tries: int = 50,
        longest_pause: float = 5.0,
        headers: dict[str, str] | None = None,
    ) -> None:
        """timeout: seconds for connecting, and for each answer; longest_pause: seconds between two tries, at most."""
        retry = urllib3.Retry(
            total=tries - 1,
            allowed_methods=None,  # POST too
            status_forcelist=(408, 425, 429, 500, 502, 503, 504, 507),
            backoff_factor=0.05,
            backoff_max=longest_pause,
            backoff_jitter=0.05,
        )
        self._pool = urllib3.PoolManager(retries=retry, timeout=urllib3.Timeout(timeout), maxsize=8)
        self._url, self._compress = url, compress
        encoding = {"Content-Encoding": "gzip"} if compress else {}
        self._headers = {"Content-Type": "application/x-ndjson", **encoding, **(headers or {})}

    def deliver(self, batch: tempo.Batch) -> None:
        """Post a batch; return when the server has taken it. Raises urllib3.exceptions.HTTPError."""
        body = b"\n".join([*batch.tolist(), b""])
        if self._compress:
            body = gzip.compress(body, compresslevel=1)
        headers = {**self._headers, "Idempotency-Key": uuid.uuid4().hex}
        answer = self._pool.request("POST", self._url, body=body, headers=headers, redirect=False)
        if not 200 <= answer.status < 300:
            raise urllib3.exceptions.HTTPError(f"{self._url} answered {answer.status} {answer.reason}")

    def close(self) -> None:
        self._pool.clear()
