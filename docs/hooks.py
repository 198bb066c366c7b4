"""What mkdocs does beside its own: pages made from the code, and links to files of the checkout.

Made at build time and not committed, so that they cannot be out of date. On a checkout `shiftgrad reference` and
`shiftgrad COMMAND --help` say the same.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from engine.reference_pages import commands_page, sweep_page, tables_page, trait_page

ROOT = Path(__file__).resolve().parent.parent
GENERATED = {
    "reference/sweep-file.md": sweep_page,
    "reference/trait-file.md": trait_page,
    "reference/tables.md": tables_page,
    "reference/commands.md": commands_page,
}
COPIED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # documents that lie beside docs/
_LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(#[^)\s]*)?(?=\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".jsonl": "json", ".json": "json", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the documents beside docs/, and a page for every file of the checkout linked to."""
    for path, write in GENERATED.items():
        files.append(File.generated(config, path, content=write()))
    for name, path in COPIED.items():
        files.append(File.generated(config, path, content=(ROOT / name).read_text(encoding="utf-8")))
    for page in [file for file in files if file.is_documentation_page()]:
        for link, _ in _LINK.findall(page.content_string):
            target = _outside(link, page.src_uri)
            if target is not None and _source_page(target) not in files.src_uris:
                files.append(File.generated(config, _source_page(target), content=_source(target)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the checkout as links within the site. One that leads nowhere stays, and mkdocs complains of it."""
    del config, files
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _in_checkout(match[1], here)
        inside = _in_site(target)
        if inside is None and _outside(match[1], here) is not None:
            inside = _source_page(target)
        return match[0] if inside is None else posixpath.relpath(inside, posixpath.dirname(here)) + (match[2] or "")

    return _LINK.sub(moved, markdown)


def _in_checkout(link: str, page: str) -> str:
    """Where a link of a page leads to, as a path of the checkout."""
    folder = "" if page in COPIED.values() else posixpath.join("docs", posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link))


def _in_site(target: str) -> str | None:
    """The page of the site that a file of the checkout is, if it is one."""
    if target == "README.md":
        return "index.md"
    if target in COPIED:
        return COPIED[target]
    return target.removeprefix("docs/") if target.startswith("docs/") else None


def _outside(link: str, page: str) -> str | None:
    """The file of the checkout, none of the site's pages, that a link leads to."""
    target = _in_checkout(link, page)
    return target if _in_site(target) is None and (ROOT / target).is_file() else None


def _source_page(target: str) -> str:
    return f"source/{target}.md"


def _source(target: str) -> str:
    path = PurePosixPath(target)
    language = _LANGUAGES.get(path.suffix, "text")
    text = (ROOT / target).read_text(encoding="utf-8")
    fence = "`" * (max((len(run) for run in re.findall("`{3,}", text)), default=2) + 1)
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {target}\n\n{fence}{language}\n{text}\n{fence}\n"
