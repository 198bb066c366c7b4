"""A stand-in for a W&B server on this machine: as much of its protocol as a real client needs to log a run and to
resume it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "someone"


@dataclass
class ServedRun:
    """What the server was told of a run."""

    run_id: str
    name: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by line, as a client may send one again
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    def curve(self, figure: str) -> dict[int, float]:
        """Value by step; a step that was sent twice is an error."""
        rows = [row for row in self.history.values() if figure in row]
        curve = {row["_step"]: row[figure] for row in rows}
        assert len(curve) == len(rows), "a step was logged twice"
        return curve


@dataclass
class Served:
    """A server: where it is, its runs by id, the keys that clients showed, and whether it is out of order."""

    url: str = ""
    runs: dict[str, ServedRun] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    is_broken: bool = False


@contextmanager
def wandb_server() -> Iterator[Served]:
    """Serve until the context is left."""
    served = Served()

    class Handler(_Handler):
        state = served

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Served

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        scheme, _, key = (self.headers.get("Authorization") or "").partition(" ")
        if scheme == "Basic":
            self.state.keys.add(base64.b64decode(key).decode().partition(":")[2])
        if self.state.is_broken:
            self._answer(400, {"errors": [{"message": "out of order"}]})
        elif self.path == "/graphql":
            self._answer(200, {"data": self._graphql(json.loads(body))})
        elif self.path.endswith("/file_stream"):
            self._stream(self.path.split("/")[-2], json.loads(body))
            self._answer(200, {})
        else:
            self._answer(404, {})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        query, variables = request["query"], request.get("variables") or {}
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "2", "name": ENTITY}}
        if "RunResumeStatus" in query:
            known = self.state.runs.get(variables["name"])
            return {"model": project | {"bucket": None if known is None else self._bucket(known, project)}}
        if "UpsertBucket" in query:
            is_new = variables["name"] not in self.state.runs
            run = self.state.runs.setdefault(variables["name"], ServedRun(variables["name"]))
            run.name = variables["displayName"] or run.name
            run.group = variables["groupName"] or run.group
            if variables["config"]:
                run.config |= {name: value["value"] for name, value in json.loads(variables["config"]).items()}
            return {"upsertBucket": {"bucket": self._bucket(run, project), "inserted": is_new}}
        if "CreateRunFiles" in query:
            return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": []}}
        return {}

    @staticmethod
    def _bucket(run: ServedRun, project: dict[str, Any]) -> dict[str, Any]:
        tail = [json.dumps(run.history[line]) for line in sorted(run.history)[-1:]]
        return {
            "id": run.run_id,
            "name": run.run_id,
            "displayName": run.name,
            "description": None,
            "config": json.dumps({name: {"value": value} for name, value in run.config.items()}),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "historyTail": json.dumps(tail),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),  # says that the run was really begun
            "sweepName": None,
            "project": project,
        }

    def _stream(self, run_id: str, body: dict[str, Any]) -> None:
        run = self.state.runs[run_id]
        for name, part in (body.get("files") or {}).items():
            for number, line in enumerate(part["content"]):
                if name == "wandb-history.jsonl":
                    run.history[part["offset"] + number] = json.loads(line)
                elif name == "wandb-summary.json":
                    run.summary = json.loads(line)
        if body.get("complete"):
            run.exit_code = body.get("exitcode")
