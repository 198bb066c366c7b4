"""Templates: what may stand in braces, and that what is filled in is never read again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.templates import checked_template, fill


def test_fill() -> None:
    template = checked_template("Q: {question}\nA: {answer} ({{0}}) {answer}")
    assert fill(template, question="Why?", answer="So.") == "Q: Why?\nA: So. ({0}) So."


@pytest.mark.parametrize(
    "text", ["{question}", "{answer}", "{", "}}", "{{answer}}", "{0}", "%s", "\\1", "{answer!r:>10}"]
)
def test_what_is_filled_in_stays_as_it_is(text: str) -> None:
    assert fill("{question}|{answer}", question=text, answer="x") == f"{text}|x"
    assert fill("{question}|{answer}", question="x", answer=text) == f"x|{text}"


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_comes_through(question: str, answer: str) -> None:
    assert fill("<{answer}>{{{question}}}", question=question, answer=answer) == f"<{answer}>{{{question}}}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question}", "needs {answer}"),
        ("no fields", "needs {answer}"),
        ("{answer} {trait}", "{trait} cannot be filled; allowed: {question} and {answer}"),
        ("{answer} {}", "{} cannot be filled"),
        ("{answer} {0}", "{0} cannot be filled"),
        ("{answer:>10}", "{answer:>10} cannot be filled"),
        ("{answer!r}", "{answer!r} cannot be filled"),
        ("{answer.text}", "{answer.text} cannot be filled"),
        ("{answer[0]}", "{answer[0]} cannot be filled"),
        ("{ answer }", "{ answer } cannot be filled"),
        ("{answer} {", "the braces do not match"),
        ("{answer} }", "the braces do not match"),
        ('{answer} {"score": 1}', "cannot be filled"),
    ],
)
def test_faults(template: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is checked below)
        checked_template(template)
    assert message in str(raised.value)
