"""Replies of judge models on disk: append-only segments, so that no committed reply is lost or asked for again.

``judgements/<writer>.jsonl`` in the store, or in an object store numbered parts of it. Every process that asks writes a
segment of its own, one line per reply, ``{"request": <id>, "reply": {...}}``, and makes it durable per batch. A kill
can tear the last line only; what is torn was not committed. Only final replies are written (``Reply.is_final``).
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
import threading
import uuid
from collections.abc import Collection, Iterator, Sequence
from typing import BinaryIO

from analysis.judges import Reply
from analysis.remote import Location
from engine.store import Store
from trainables.errors import StoreError
from trainables.failpoints import failpoint

FOLDER = "judgements"


def known_replies(store: Store, wanted: Collection[str]) -> dict[str, Reply]:
    """Committed replies of these requests, from all segments; the first one of a request counts.

    Raises StoreError for a line that is broken, unless it is the torn last one of its segment.
    """
    return ReplyIndex(store).find(wanted)


class ReplyIndex:
    """Where every committed reply lies. What was read once is not read again: a store may hold millions of replies, and
    every judging task looks. Thread-safe."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._where: dict[str, tuple[str, int]] = {}  # request -> segment, offset of its line
        self._read: dict[str, int] = {}  # segment -> bytes that are in the index
        self._lock = threading.Lock()

    def find(self, wanted: Collection[str]) -> dict[str, Reply]:
        """As ``known_replies``, with what has been committed until now."""
        if not wanted:
            return {}
        with self._lock:
            for name, size in sorted(self.store.sizes(FOLDER).items()):
                if name.endswith(".jsonl") and size != self._read.get(name, 0):
                    self._extend(name)
            places: dict[str, list[tuple[int, str]]] = {}
            for request_id in wanted:
                if request_id in self._where:
                    name, offset = self._where[request_id]
                    places.setdefault(name, []).append((offset, request_id))
        return {
            request_id: reply
            for name, lines in places.items()
            for request_id, reply in self._replies(name, sorted(lines))
        }

    def _replies(self, name: str, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[str, Reply]]:
        with self.store.reader(f"{FOLDER}/{name}") as file:
            for offset, request_id in lines:
                file.seek(offset)
                yield request_id, _parsed(file, self._place(name), offset, file.readline())[1]

    def _place(self, name: str) -> Location:
        return self.store.location / FOLDER / name

    def _extend(self, name: str) -> None:
        """Take in the whole lines that a segment has gained."""
        offset = self._read.get(name, 0)
        with self.store.reader(f"{FOLDER}/{name}") as file:
            file.seek(offset)
            while (line := file.readline()).endswith(b"\n"):  # else torn by a kill, or being written right now
                self._where.setdefault(_request_id(file, self._place(name), offset, line), (name, offset))
                offset += len(line)
        self._read[name] = offset


_HEAD = b'{"request":"'
_ID_LENGTH = 24


def _request_id(file: BinaryIO, place: Location, offset: int, line: bytes) -> str:
    """The id in a line of ours, without reading the whole of it as JSON."""
    end = len(_HEAD) + _ID_LENGTH
    if line.startswith(_HEAD) and line[end : end + 2] == b'",':
        return line[len(_HEAD) : end].decode("ascii", "replace")
    return _parsed(file, place, offset, line)[0]


def _parsed(file: BinaryIO, place: Location, offset: int, line: bytes) -> tuple[str, Reply]:
    try:
        raw = json.loads(line)
        return str(raw["request"]), Reply.from_json(json.dumps(raw["reply"]))
    except (ValueError, KeyError, TypeError) as error:
        file.seek(0)
        number = file.read(offset).count(b"\n") + 1
        raise StoreError(
            f"{place}, line {number}: not a reply ({error}); the file was changed by something else. "
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
