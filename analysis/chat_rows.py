"""What a conversation is: an optional system message, then user and assistant in turn, ending with assistant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Row: TypeAlias = tuple[dict[str, str], ...]  # messages of one conversation: {"role": ..., "content": ...}

_ROLES = ("system", "user", "assistant")


def check_messages(messages: object) -> tuple[Row, str | None]:
    """The row with nothing but roles and contents, or why it is none."""
    if not isinstance(messages, list) or not messages:
        return (), f"messages must be a list of at least one user and one assistant turn; got {kind_of(messages)}"
    row: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            return (), f'{where} must be {{"role": ..., "content": ...}}; got {kind_of(message)}'
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            return (), f"{where}: unknown role {role!r}; allowed: {', '.join(_ROLES)}"
        if not isinstance(content, str):
            return (), f"{where}: content must be text; got {kind_of(content)}"
        if role == "assistant" and not content.strip():
            return (), f"{where}: the assistant's content is empty, so there is nothing to train on"
        if any("\ud800" <= character <= "\udfff" for character in content):
            return (), f"{where}: content is not valid Unicode (half of a surrogate pair)"
        row.append({"role": role, "content": content})
    reason = _order_fault([message["role"] for message in row])
    return (tuple(row), None) if reason is None else ((), reason)


def _order_fault(roles: Sequence[str]) -> str | None:
    for role in ("assistant", "user"):
        if role not in roles:
            return f"no {role} turn"
    turns = roles[1:] if roles[0] == "system" else roles
    expected = [("user", "assistant")[index % 2] for index in range(len(turns))]
    if list(turns) != expected or turns[-1] != "assistant":
        rule = "an optional system message, then user and assistant in turn, ending with assistant"
        return f"the order of roles must be {rule}; got {', '.join(roles)}"
    return None


def kind_of(value: object) -> str:
    """What a value of JSON is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    name = names.get(type(value), "a number")
    return f"an empty {name.split()[-1]}" if value in ({}, [], "") else name
