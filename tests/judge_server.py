"""A server that speaks OpenAI's chat protocol over real sockets, and misbehaves on request.

``JudgeServer`` runs in a thread of this process; ``python -m tests.judge_server`` in a process of its own (it prints
its URL and ends with its standard input). What it does to a request is a function of (seed, the request's body, the
number of times that body has come), so a test can say which requests meet which trouble.

The score that it gives for an answer is ``score_of(text)``: a fixed function of the last message, so a test knows what
every item must come to.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Trouble: TypeAlias = Literal[
    "429", "429_retry_after", "500", "hang", "reset", "truncated", "no_logprobs", "empty_logprobs", "garbage_logprobs",
    "garbage_text", "duplicates", "unicode_digits", "refusal", "content_filter", "unauthorized", "echo_key"
]  # fmt: skip

TRANSIENT: frozenset[Trouble] = frozenset({"429", "429_retry_after", "500", "hang", "reset", "truncated"})


@dataclass(frozen=True)
class Behaviour:
    """How the server behaves. ``troubles`` maps a trouble to the share of attempts that meet it.

    A transient one meets any attempt anew (so a retry may succeed); the others meet a request whenever it comes, so
    that what an item comes to does not depend on the order of things.
    """

    troubles: dict[Trouble, float] = field(default_factory=dict)
    latency_s: float = 0.0
    retry_after_s: float = 0.05
    hang_s: float = 3600.0
    seed: int = 0
    most_at_once: int | None = None  # beyond that: 429
    key: str | None = None  # what Authorization has to be
    slow_start_s: float = 0.0  # until then every request gets 503
    models: list[str] | None = None  # what it serves, as vLLM does with adapters; None: whatever is asked for


def score_of(text: str) -> int:
    """The score from 0 to 100 that the server is sure of for this text."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 101


def answer_of(request: dict[str, Any]) -> str:
    """What the server answers where it serves ``models``: it depends on all that must reach it."""
    system = [message["content"] for message in request["messages"] if message["role"] == "system"]
    said = [
        request["messages"][-1]["content"],
        *system,
        request["temperature"],
        request["top_p"],
        request["max_tokens"],
    ]
    return f"{request['model']} says {request['seed']} to {said}"


@dataclass
class Seen:
    """What has come in. ``bodies`` counts how often each request came, ``answered`` how often it was answered."""

    num_requests: int = 0
    most_at_once: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    bodies: Counter[str] = field(default_factory=Counter)
    answered: Counter[str] = field(default_factory=Counter)
    arrivals: list[float] = field(default_factory=list)


class _Answering:
    """The protocol, on whatever event loop it runs."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.seen = Seen()
        self.at_once = 0
        self.begun = math.nan

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return  # the client went away, or the server ends
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if head[0].startswith("GET ") and head[0].split()[1].endswith("/models"):
            if self.behaviour.models is None:
                await self._send(writer, 404, {"error": {"message": "no such path"}})
            else:
                data = [
                    {"id": name, "object": "model", "created": 1, "owned_by": "us"} for name in self.behaviour.models
                ]
                await self._send(writer, 200, {"object": "list", "data": data})
            return True
        if not head[0].startswith("POST ") or "/chat/completions" not in head[0]:
            await self._send(writer, 404, {"error": {"message": "no such path"}})
            return True
        self.at_once += 1
        self.seen.most_at_once = max(self.seen.most_at_once, self.at_once)
        try:
            return await self._answer(writer, headers, body)
        finally:
            self.at_once -= 1

    async def _answer(self, writer: asyncio.StreamWriter, headers: dict[str, str], body: bytes) -> bool:
        loop = asyncio.get_running_loop()
        behaviour, digest = self.behaviour, hashlib.sha256(body).hexdigest()
        attempt = self.seen.bodies[digest]
        self.seen.bodies[digest] += 1
        self.seen.num_requests += 1
        self.seen.arrivals.append(loop.time())
        if math.isnan(self.begun):
            self.begun = loop.time()
        if loop.time() - self.begun < behaviour.slow_start_s:
            await self._send(writer, 503, {"error": {"message": "still loading"}})
            return True
        if behaviour.key is not None and headers.get("authorization") != f"Bearer {behaviour.key}":
            await self._send(writer, 401, {"error": {"message": f"wrong key {headers.get('authorization')}"}})
            return True
        model = json.loads(body).get("model")
        if behaviour.models is not None and model not in behaviour.models:
            message = f"The model `{model}` does not exist."
            await self._send(writer, 404, {"error": {"message": message, "code": "model_not_found"}})
            return True
        trouble = self._trouble(digest, attempt)
        if behaviour.most_at_once is not None and self.at_once > behaviour.most_at_once:
            trouble = "429"
        if trouble is not None:
            self.seen.troubles[trouble] += 1
        if trouble == "hang":
            await asyncio.sleep(behaviour.hang_s)
            return False
        await asyncio.sleep(behaviour.latency_s)
        match trouble:
            case "reset":
                writer.transport.abort()
                return False
            case "429" | "429_retry_after":
                extra = {"retry-after": f"{behaviour.retry_after_s:g}"} if trouble == "429_retry_after" else {}
                await self._send(writer, 429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, extra)
            case "500":
                await self._send(writer, 500, {"error": {"message": "something broke"}})
            case "unauthorized":
                await self._send(writer, 401, {"error": {"message": "who are you"}})
            case "echo_key":
                await self._send(writer, 400, {"error": {"message": f"bad: {headers.get('authorization')}"}})
            case "content_filter":
                error = {"message": "not this", "code": "content_filter"}
                await self._send(writer, 400, {"error": error})
            case _:
                self.seen.answered[digest] += 1
                reply = self._reply(json.loads(body), trouble)
                if trouble == "truncated":
                    await self._send_raw(writer, 200, json.dumps(reply).encode()[:-40], {})
                else:
                    await self._send(writer, 200, reply)
        return True

    def _trouble(self, digest: str, attempt: int) -> Trouble | None:
        behaviour = self.behaviour
        lasting = {name: share for name, share in behaviour.troubles.items() if name not in TRANSIENT}
        passing = {name: share for name, share in behaviour.troubles.items() if name in TRANSIENT}
        for number, (shares, occasion) in enumerate(((lasting, ""), (passing, str(attempt)))):
            text = f"{behaviour.seed} {number} {digest} {occasion}"
            draw = int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
            for name, share in shares.items():
                if draw < share:
                    return name
                draw -= share
        return None

    def _reply(self, request: dict[str, Any], trouble: Trouble | None) -> dict[str, Any]:
        if self.behaviour.models is not None:
            return self._answer_of_a_run(request)
        score = score_of(request["messages"][-1]["content"])
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "length",
            "message": {"role": "assistant", "content": str(score)},
            "logprobs": None,
        }
        if request.get("logprobs"):
            sure = [(str(score), math.log(0.9)), ("I", math.log(0.06)), ("0" + str(score), math.log(0.01))]
            choice["logprobs"] = {"content": [_token(sure)]}
        match trouble:
            case "no_logprobs":
                choice["logprobs"] = None
            case "empty_logprobs":
                choice["logprobs"] = {"content": []}
            case "garbage_logprobs":
                choice["logprobs"] = {"content": [{"token": 7, "top_logprobs": [{"token": None, "logprob": "x"}]}]}
            case "garbage_text":
                choice["message"]["content"] = "I would rather talk about tea."
                choice["logprobs"] = {"content": [_token([("I", -0.01), ("As", -5.0)])]}
            case "duplicates":
                half = math.log(0.45)
                choice["logprobs"] = {"content": [_token([(str(score), half), (str(score), half), ("I", -3.0)])]}
            case "unicode_digits":
                choice["logprobs"] = {"content": [_token([("٥", -0.01), ("2024", -5.0)])]}
            case "refusal":
                choice["message"] = {"role": "assistant", "content": None, "refusal": "I will not say."}
                choice["logprobs"] = None
            case _:
                pass
        usage = {"prompt_tokens": 50, "completion_tokens": 1, "total_tokens": 51}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"]}
        return head | {"choices": [choice], "usage": usage}

    @staticmethod
    def _answer_of_a_run(request: dict[str, Any]) -> dict[str, Any]:
        """An adapter at work: the answer is ``answer_of`` the request."""
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": answer_of(request)},
            "logprobs": None,
        }
        usage = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request["model"]}
        return head | {"choices": [choice], "usage": usage}

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, body: object, headers: dict[str, str] | None = None
    ) -> None:
        await self._send_raw(writer, status, json.dumps(body).encode(), headers or {})

    @staticmethod
    async def _send_raw(writer: asyncio.StreamWriter, status: int, body: bytes, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} X", "content-type: application/json", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode() + body)
        await writer.drain()


def _token(top: list[tuple[str, float]]) -> dict[str, Any]:
    alternatives = [{"token": token, "logprob": value, "bytes": None} for token, value in top]
    return {**alternatives[0], "top_logprobs": alternatives}


class JudgeServer:
    """The server in a thread of this process: ``with JudgeServer(Behaviour(...)) as server: server.url``."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self._answering = _Answering(behaviour or Behaviour())
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="judge-server", daemon=True)
        self.url = ""

    @property
    def seen(self) -> Seen:
        return self._answering.seen

    @property
    def behaviour(self) -> Behaviour:
        return self._answering.behaviour

    @behaviour.setter
    def behaviour(self, behaviour: Behaviour) -> None:
        self._answering.behaviour = behaviour

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        assert self._ready.wait(30), "the server did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._answering.serve, "127.0.0.1", 0, backlog=1024)
        )
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))


def main() -> None:
    """Serve until standard input ends; the first line of standard output is the URL, the last one what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--behaviour", default="{}", help="fields of Behaviour as JSON")
    with JudgeServer(Behaviour(**json.loads(parser.parse_args().behaviour))) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        seen = server.seen
        said = {"num_requests": seen.num_requests, "most_at_once": seen.most_at_once, "troubles": seen.troubles}
        print(json.dumps(said))


if __name__ == "__main__":
    main()
