"""Chat data of persona_vectors, inoculation-prompting and emergent-misalignment: ``{"messages": [...]}`` per line.

That is our own format (an inoculation is a system message at index 0), so a sweep reads such a file where it lies;
importing one checks every row and writes it without the columns that we do not read.
"""

from __future__ import annotations

from analysis.chat_rows import check_messages
from analysis.formats.base import Foreign, Format, Hints, Imported, MadeChat, raise_faults


class ChatJsonl(Format):
    name = "chat"
    what = "chat data (.jsonl: messages)"

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        first = file.first_line if file.suffix == ".jsonl" else None
        return isinstance(first, dict) and "messages" in first

    def read(self, file: Foreign, hints: Hints) -> Imported:
        del hints
        rows, faults = [], []
        for line, raw in file.lines:
            row, reason = check_messages(raw.get("messages") if isinstance(raw, dict) else None)
            if reason is not None:
                faults.append(file.fault(reason, str(line)))
            else:
                rows.append(row)
        raise_faults(faults)
        with_system = sum(row[0]["role"] == "system" for row in rows)
        system = f", {with_system} with a system message" if with_system else ""
        return Imported(self.name, (MadeChat(file.name, tuple(rows)),), (f"{len(rows)} conversations{system}",))
