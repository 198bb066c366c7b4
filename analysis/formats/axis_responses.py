"""Responses of assistant-axis: ``{system_prompt, prompt_index, question_index, question, conversation, label}``.

The conversations are chat rows; every label (pos, neg, default) becomes a file of its own, to make vectors of.
"""

from __future__ import annotations

from typing import Any

from analysis.chat_rows import check_messages
from analysis.formats.base import Foreign, Format, Hints, Imported, MadeChat, raise_faults
from trainables.errors import Fault

NO_LABEL = "responses"


class AxisResponses(Format):
    name = "axis-responses"
    what = "responses of assistant-axis (.jsonl: conversation, label, ...)"

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        first = file.first_line if file.suffix == ".jsonl" else None
        return isinstance(first, dict) and "conversation" in first and "messages" not in first

    def read(self, file: Foreign, hints: Hints) -> Imported:
        del hints
        by_label: dict[str, list[tuple[dict[str, str], ...]]] = {}
        faults: list[Fault] = []
        for line, raw in file.lines:
            row, reason = check_messages(raw.get("conversation") if isinstance(raw, dict) else None)
            label: Any = raw.get("label", NO_LABEL) if isinstance(raw, dict) else None
            if reason is None and not isinstance(label, str):
                reason = f"label must be a text; got {label!r}"
            if reason is not None:
                faults.append(file.fault(reason.replace("messages", "conversation"), str(line)))
            else:
                by_label.setdefault(label, []).append(row)
        raise_faults(faults)
        made = tuple(MadeChat(f"{file.name}_{label}", tuple(rows)) for label, rows in by_label.items())
        counts = ", ".join(f"{label} {len(rows)}" for label, rows in by_label.items())
        return Imported(self.name, made, (f"conversations by label: {counts}; a file of each",))
