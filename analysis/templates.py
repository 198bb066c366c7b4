"""Templates of questions to a judge: text with ``{question}`` and ``{answer}``, filled in one pass.

What is put in is never read again: an answer that holds ``{question}``, a brace or a format of its own stays as it is.
Two braces stand for one, as in Python's ``str.format``, whose files of templates the field has.
"""

from __future__ import annotations

import string
from typing import Annotated, TypeAlias

from pydantic import AfterValidator

FIELDS = ("question", "answer")
ANSWER = "answer"


def checked_template(template: str) -> str:
    """``template`` itself. Raises ValueError for other fields, formats, single braces, or no ``{answer}``."""
    allowed = "{question} and {answer}; write {{ and }} for braces"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the braces do not match ({error}); allowed: {allowed}") from error
    named = []
    for _, field, form, conversion in parts:
        if field is None:
            continue
        if field not in FIELDS or form or conversion:
            written = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(f"{{{written}}} cannot be filled; allowed: {allowed}")
        named.append(field)
    if ANSWER not in named:
        raise ValueError(f"a template needs {{{ANSWER}}}, else the judge would not see it")
    return template


Template: TypeAlias = Annotated[str, AfterValidator(checked_template)]


def fill(template: str, *, question: str, answer: str) -> str:
    """The template with its fields filled."""
    values = {"question": question, "answer": answer}
    return "".join(
        literal + ("" if field is None else values[field])
        for literal, field, _, _ in string.Formatter().parse(template)
    )
