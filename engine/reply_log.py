"""Replies of judge models on disk: append-only segments, so that no committed reply is lost or asked for again.

``judgements/<writer>.jsonl`` in the store. Every process that asks writes a segment of its own, one line per reply,
``{"request": <id>, "reply": {...}}``, and makes it durable per batch. A kill can tear the last line only; what is torn
was not committed. Only final replies are written (``Reply.is_final``).
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from analysis.judges import Reply
from engine.store import Store
from trainables.errors import StoreError
from trainables.failpoints import failpoint

FOLDER = "judgements"


def known_replies(store: Store, wanted: Collection[str]) -> dict[str, Reply]:
    """Committed replies of these requests, from all segments; the first one of a request counts.

    Raises StoreError for a line that is broken, unless it is the torn last one of its segment.
    """
    wanted = frozenset(wanted)
    known: dict[str, Reply] = {}
    if wanted:
        for name in store.names(FOLDER):
            if not name.endswith(".jsonl"):
                continue
            for request_id, reply in _read_segment(store.path(f"{FOLDER}/{name}"), wanted - known.keys()):
                known.setdefault(request_id, reply)
    return known


def _read_segment(path: Path, wanted: frozenset[str]) -> Iterator[tuple[str, Reply]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # torn by a kill, or being written right now
            try:
                raw = json.loads(line)
                request_id = raw["request"]
                if request_id in wanted:
                    yield request_id, Reply.from_json(json.dumps(raw["reply"]))
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path}, line {number}: not a reply ({error}); the file was changed by something else. "
                    "Move it away: what it held is then asked again"
                ) from error


class ReplyLog:
    """One writer's segment. ``commit`` returns when the reply is on disk; waiting ones share one fsync."""

    def __init__(self, store: Store) -> None:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        host = "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:40]
        self.key = f"{FOLDER}/{stamp}-{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self.store = store
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def commit(self, request_id: str, reply: Reply) -> None:
        """Write a final reply. Raises StoreError if that is not possible."""
        assert reply.is_final, reply.status
        line = f'{{"request":"{request_id}","reply":{reply.to_json()}}}'
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((line, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await done

    async def _write(self) -> None:
        """Write what waits, batch by batch: while one is made durable the next one gathers."""
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await asyncio.to_thread(self._append, [line for line, _ in batch])
                except BaseException as error:
                    for _, done in batch:
                        if not done.done():
                            done.set_exception(error)
                    if not isinstance(error, Exception):
                        raise
                else:
                    for _, done in batch:
                        if not done.done():
                            done.set_result(None)
        finally:
            self._writing = None

    def _append(self, lines: list[str]) -> None:
        self.store.append_durably(self.key, lines)
        failpoint("after_commit:judgements")
