"""Which undefended run a run is compared with: the one of the same sweep that is the same but for the defense."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from analysis.manifest import EditEntry, RunEntry, Scalar

NO_DEFENSE = "none"
ITSELF = "it is undefended itself"


@dataclass(frozen=True)
class Partner:
    """The undefended run's label, or the problem: why there is none. Exactly one of them is there."""

    label: str | None
    problem: str | None


def is_undefended(entry: RunEntry) -> bool:
    """Whether this is a run whose defense is the empty list."""
    items = [name for name in entry.config if name.startswith("defense.")]
    return entry.kind == "run" and not items and entry.config.get("defense") == NO_DEFENSE


def partners_of(entries: Sequence[RunEntry]) -> dict[str, Partner]:
    """The undefended run of every row by label. Nothing is guessed: with several candidates, or none, there is none. Of
    a model whose weights were moved it is the model before that."""
    labels = {entry.label for entry in entries}
    undefended = [entry for entry in entries if is_undefended(entry)]
    by_settings: dict[frozenset[tuple[str, str]], list[str]] = {}
    for entry in undefended:
        by_settings.setdefault(_key(settings_of(entry)), []).append(entry.label)
    return {
        entry.label: _before_the_edit(entry.edit, labels)
        if entry.edit is not None
        else _partner(entry, by_settings, undefended)
        for entry in entries
    }


def differing(configs: Sequence[Mapping[str, Scalar]]) -> list[str]:
    """The fields whose values are not the same in all of these, in order of appearance; absent is a value."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({repr(config[name]) if name in config else None for config in configs}) > 1]


def _before_the_edit(edit: EditEntry, labels: Collection[str]) -> Partner:
    if edit.target in labels:
        return Partner(edit.target, None)
    return Partner(None, f"the model before the edit, {edit.target!r}, is not among the rows")


def _partner(
    entry: RunEntry, by_settings: Mapping[frozenset[tuple[str, str]], list[str]], undefended: Sequence[RunEntry]
) -> Partner:
    if entry.kind != "run":
        return Partner(
            None, "a base is not trained" if entry.kind == "base" else "imported answers have no runs beside"
        )
    if is_undefended(entry):
        return Partner(None, ITSELF)
    labels = by_settings.get(_key(settings_of(entry)), [])
    if len(labels) == 1:
        return Partner(labels[0], None)
    if labels:
        return Partner(None, f"several undefended runs have the same settings: {', '.join(labels)}")
    if not undefended:
        return Partner(None, "the sweep has no undefended run")
    settings = settings_of(entry)
    nearest = min(undefended, key=lambda other: len(differing([settings, settings_of(other)])))
    fields = ", ".join(differing([settings, settings_of(nearest)]))
    return Partner(
        None, f"no undefended run has the same settings; the nearest, {nearest.label!r}, differs in {fields}"
    )


def settings_of(entry: RunEntry) -> dict[str, Scalar]:
    """Every field of a row of the sweep but those of its defense."""
    return {name: value for name, value in entry.config.items() if name.partition(".")[0] != "defense"}


def _key(settings: Mapping[str, Scalar]) -> frozenset[tuple[str, str]]:
    return frozenset((name, repr(value)) for name, value in settings.items())
