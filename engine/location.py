"""Where a store may be: what a location means, and why none can be opened or made there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainables.errors import StoreError

FORMAT = 1
MARKER = "store.json"
TEMPORARY = ".tmp"
MARKER_CONTENT = (json.dumps({"format": FORMAT, "kind": "shiftgrad store"}, indent=2, sort_keys=True) + "\n").encode()

# One slash is enough: a Path turns s3://bucket into s3:/bucket
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")


def local_root(location: str | Path) -> Path:
    """The absolute local folder that a location means: workers start in other folders than the driver.

    Raises StoreError for a URL that is not a local file's, as object stores are not supported yet.
    """
    text = str(location)
    url = _URL.match(text)
    if url is None:
        return Path(os.path.abspath(Path(text).expanduser()))
    parts = urlsplit(text)
    if url["scheme"].lower() != "file":
        raise StoreError(
            f"{text}: object stores are not supported yet; give a local folder (a mounted one will do) or file:///..."
        )
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{text}: a file URL with a host; a local folder has three slashes, file:///...")
    return Path(os.path.abspath(unquote(parts.path)))


def location_faults(location: str | Path) -> list[str]:
    """Why no store can be opened or made at ``location``, or nothing. Touches nothing on disk."""
    try:
        root = local_root(location)
    except StoreError as error:
        return [str(error)]
    if not os.path.exists(root):
        return _absent_faults(location, root)
    if not root.is_dir():
        return [f"{location} is a file; the store is a folder"]
    faults = []
    if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
        faults.append(f"{location} is not readable and writable for this user")
    if os.access(root, os.R_OK | os.X_OK):
        faults += _content_faults(location, root)
    return faults


def _absent_faults(location: str | Path, root: Path) -> list[str]:
    parent = root
    while not os.path.lexists(parent):
        parent = parent.parent
    if os.path.islink(parent) and not os.path.exists(parent):
        return [f"{location}: {parent} is a symbolic link to nothing"]
    if not parent.is_dir():
        return [f"{location} cannot be made: {parent} is a file"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"{location} cannot be made: {parent} is not writable for this user"]
    return []


def _content_faults(location: str | Path, root: Path) -> list[str]:
    marker = root / MARKER
    if not marker.exists():
        # a kill while the store was being made leaves the folder for temporary files alone
        others = sorted(set(os.listdir(root)) - {TEMPORARY})
        if others:
            return [
                f"{location} is not a shiftgrad store: it holds {others[0]} but no {MARKER}; "
                "give a new or an empty folder"
            ]
        return []
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        found = content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{location} is not a shiftgrad store: {MARKER} cannot be read ({error!r})"]
    if found != FORMAT:
        return [f"{location} is a store of the unknown format {found!r}; this version of shiftgrad knows {FORMAT}"]
    return []
