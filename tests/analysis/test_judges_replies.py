"""Requests and replies as they are kept: identities, and JSON that comes back as it was."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.judges import Reply, Request

REQUEST = Request("m", (("user", "Why?"),), 1, 0.0, 20, 0)


class TestRequest:
    def test_its_id_is_golden(self) -> None:
        # kept replies are found by it: a change asks everything in every store again
        assert REQUEST.id == "fedba20b41f5153c20423e02"

    @pytest.mark.parametrize(
        "change",
        [
            {"model": "n"},
            {"messages": (("system", "Why?"),)},
            {"messages": (("user", "Why"), ("user", "?"))},
            {"max_tokens": 2},
            {"temperature": 1.0},
            {"top_logprobs": None},
            {"seed": None},
            {"draw": 1},
        ],
    )
    def test_every_field_counts(self, change: dict[str, Any]) -> None:
        assert dataclasses.replace(REQUEST, **change).id != REQUEST.id

    def test_it_is_the_same_everywhere(self) -> None:
        assert REQUEST.id == dataclasses.replace(REQUEST).id
        assert len(REQUEST.id) == 24

    @settings(deadline=None)
    @given(st.text())
    def test_any_text(self, text: str) -> None:
        assert len(dataclasses.replace(REQUEST, messages=(("user", text + "\ud800"),)).id) == 24


REPLIES = st.builds(
    Reply,
    status=st.sampled_from(["ok", "refused", "api_error", "budget_exhausted"]),
    text=st.none() | st.text(),
    top_logprobs=st.none() | st.lists(st.tuples(st.text(), st.floats(allow_nan=False)), max_size=20).map(tuple),
    error=st.none() | st.text(),
    num_prompt_tokens=st.none() | st.integers(0, 10**6),
    num_completion_tokens=st.none() | st.integers(0, 10**6),
    seconds=st.none() | st.floats(0, 1e6),
)


class TestReply:
    @settings(deadline=None)
    @given(REPLIES)
    def test_there_and_back(self, reply: Reply) -> None:
        line = reply.to_json()
        assert Reply.from_json(line) == Reply.from_json(line.encode()) == reply
        assert line.isascii()
        assert "\n" not in line
        assert line == json.dumps(json.loads(line), separators=(",", ":")), "compact"

    def test_nan_and_infinity(self) -> None:
        reply = Reply("ok", top_logprobs=(("a", math.nan), ("b", -math.inf), ("b", math.inf)))
        assert '[["a","nan"],["b","-inf"],["b","inf"]]' in reply.to_json()
        back = Reply.from_json(reply.to_json()).top_logprobs
        assert back is not None
        assert math.isnan(back[0][1])
        assert back[1:] == (("b", -math.inf), ("b", math.inf))

    def test_without_timing(self) -> None:
        reply = Reply("ok", "85", seconds=0.5)
        assert reply.to_json() == '{"status":"ok","text":"85","seconds":0.5}'
        assert reply.to_json(timing=False) == '{"status":"ok","text":"85"}'

    def test_which_are_kept(self) -> None:
        kept = {status: Reply(status).is_final for status in ("ok", "refused", "api_error", "budget_exhausted")}
        assert kept == {"ok": True, "refused": True, "api_error": False, "budget_exhausted": False}

    @pytest.mark.parametrize(
        "line",
        [
            "",
            "[]",
            "null",
            "{}",
            '{"status":"fine"}',
            '{"status":"ok","text":5}',
            '{"status":"ok","txt":"5"}',
            '{"status":"ok","text":"5"',
            '{"status":"ok","seconds":NaN}',
            '{"status":"ok","seconds":true}',
            '{"status":"ok","num_prompt_tokens":1.5}',
            '{"status":"ok","top_logprobs":{"a":-1}}',
            '{"status":"ok","top_logprobs":[["a"]]}',
            '{"status":"ok","top_logprobs":[["a","-1"]]}',
            '{"status":"ok","top_logprobs":[[1,-1]]}',
            '{"status":"ok","top_logprobs":[["a",true]]}',
            '{"status":"ok","top_logprobs":[["a",-Infinity]]}',
        ],
    )
    def test_nothing_else_is_read(self, line: str) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 (broken JSON has messages of its own)
            Reply.from_json(line)
