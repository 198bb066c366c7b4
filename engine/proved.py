"""What has been proved of a sweep's rows, kept beside the sweep, so that going on need not prove it all again.

Proving means loading a tokenizer and making tokens of every row: seconds, also where nothing is left to do. What comes
out is a function of the tokenizer, the rows, a few settings and our own code, so it is known again by a hash of all of
these. Only what was proved is kept; a fault is found anew every time. Trainings prove every row again as they use it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.manifest import sweep_key
from engine.store import Store
from trainables import chat_data, chat_encoder, sample
from trainables.base_model import ResolvedBase
from trainables.embedded import PREFIX
from trainables.errors import StoreError

_LIBRARIES = ("transformers", "tokenizers", "jinja2")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Proved:
    """Counts by the hash of what they were proved of."""

    def __init__(self, known: Mapping[str, Sequence[int]] | None = None) -> None:
        self._known = known or {}
        self.kept: dict[str, list[int]] = {}
        """What this invocation asked for and is proved: what its sweep keeps."""

    @classmethod
    def read(cls, results: str, sweep: str) -> Proved:
        """What the store knows of the sweep; nothing where there is no store yet, or nothing readable in it."""
        try:
            known = Store.open(results).read_json(proved_key(sweep))
        except StoreError:  # nothing is known, so everything is proved
            return cls()
        return cls(known if isinstance(known, dict) else None)

    def recall(self, base: ResolvedBase, *what: Any) -> list[int] | None:
        """The counts that were kept for this, or None."""
        key = _hash(base, what)
        if key not in self._known:
            return None
        self.kept[key] = list(self._known[key])
        return self.kept[key]

    def keep(self, base: ResolvedBase, *what: Any, counts: Sequence[int]) -> None:
        """Keep counts, unless nobody can say whether it is the same tokenizer next time."""
        if base.source.startswith(PREFIX) or base.model == "folder" or _COMMIT.fullmatch(base.revision):
            self.kept[_hash(base, what)] = list(counts)


def proved_key(sweep: str) -> str:
    """Where a sweep keeps it in the store."""
    return sweep_key(sweep, "proved.json")


def _hash(base: ResolvedBase, what: Sequence[Any]) -> str:
    parts = {"base": [base.model, base.revision], "what": what, "code": _code()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Hash of the code that makes tokens and proves them, and of the versions of the libraries under it."""
    digest = hashlib.sha256()
    for module in (chat_data, chat_encoder, sample):
        digest.update(Path(str(module.__file__)).read_bytes())
    for name in _LIBRARIES:
        digest.update(f"{name} {importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()
