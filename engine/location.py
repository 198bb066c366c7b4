"""Where a store may be: what a location means, and why none can be opened or made there."""

from __future__ import annotations

import json
import os
from pathlib import Path

from analysis.remote import Location, Remote, location_of, reached
from trainables.errors import StoreError

FORMAT = 1
MARKER = "store.json"
TEMPORARY = ".tmp"
MARKER_CONTENT = (json.dumps({"format": FORMAT, "kind": "shiftgrad store"}, indent=2, sort_keys=True) + "\n").encode()


def location_faults(location: str | Location) -> list[str]:
    """Why no store can be opened or made at ``location``, or nothing. Writes nothing; looks into an object store."""
    try:
        root = location_of(location)
    except StoreError as error:
        return [str(error)]
    if isinstance(root, Remote):
        return _remote_faults(location, root)
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


def _absent_faults(location: str | Location, root: Path) -> list[str]:
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


def _content_faults(location: str | Location, root: Path) -> list[str]:
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
        content = marker.read_bytes()
    except OSError as error:
        return [f"{location} is not a shiftgrad store: {MARKER} cannot be read ({error!r})"]
    return _marker_faults(location, content)


def _remote_faults(location: str | Location, root: Remote) -> list[str]:
    if not root.url.partition("://")[2].partition("/")[2]:
        return [f"{location}: give a path in the bucket, such as {root}/results"]
    try:
        try:
            return _marker_faults(location, (root / MARKER).read_bytes())
        except FileNotFoundError:
            pass
        fs, path = root.opened()
        bucket = path.strip("/").partition("/")[0]
        with reached(root):
            if not fs.exists(bucket):
                return [f"{location}: there is no bucket {bucket!r}, or these credentials may not see it"]
        others = root.sizes()
    except StoreError as error:
        return [str(error)]
    if others:
        return [
            f"{location} is not a shiftgrad store: it holds {min(others)} but no {MARKER}; give a new or an empty place"
        ]
    return []


def _marker_faults(location: str | Location, content: bytes) -> list[str]:
    try:
        found = json.loads(content)["format"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{location} is not a shiftgrad store: {MARKER} cannot be read ({error!r})"]
    if found != FORMAT:
        return [f"{location} is a store of the unknown format {found!r}; this version of shiftgrad knows {FORMAT}"]
    return []
