"""YAML as this project reads it: plain data only, every scalar what it looks like, nothing given twice.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``1:30`` is ninety and a date is a date object.
Here the scalars are those of YAML 1.2: null, true, false, whole numbers, decimal numbers with or without exponent;
everything else is text. A key that stands twice in one mapping is a fault instead of silently winning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from trainables.errors import Fault

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_TAG + kind for kind in ("null", "bool", "int", "float", "str", "seq", "map"))


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (and merge keys, which 1.2 dropped and users like)."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_NUMBER_STARTS = list("-+.0123456789")
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?[0-9]{1,300}$"), _NUMBER_STARTS)
_Loader.add_implicit_resolver(
    _TAG + "float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    _NUMBER_STARTS,
)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor(_TAG + "int", _int)
_Loader.add_constructor(_TAG + "float", _float)


def read_yaml(text: str, source: str) -> tuple[Any, list[Fault]]:
    """The plain data (dict, list, str, int, float, bool, None) that ``text`` says, and what is wrong with the text.

    ``source`` names the text in the keys of the faults (``sweep.yaml:12``, lines counted from 1). After a syntax
    error or a tag the data is None; a key given twice is a fault and the last value is returned, so that the rest
    can be checked too.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # the reader refuses characters that YAML does not allow
        return None, [_syntax_fault(error, source, text)]
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        fatal, faults = _check(node, source)
        if fatal:
            return None, fatal + faults
        return loader.construct_document(node), faults
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an explicit tag on a scalar it cannot hold
        return None, [_syntax_fault(error, source, text)]
    except RecursionError:
        return None, [Fault(source, "not valid YAML: nested too deeply")]
    finally:
        loader.dispose()


def _syntax_fault(error: Exception, source: str, text: str) -> Fault:
    where = source
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        where = f"{source}:{error.problem_mark.line + 1}"
    elif isinstance(error, yaml.reader.ReaderError):
        where = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    context = getattr(error, "context", None)
    return Fault(where, f"not valid YAML: {reason}" + (f" ({context})" if context else ""))


def _check(root: yaml.Node, source: str) -> tuple[list[Fault], list[Fault]]:
    """Faults that forbid building the data (tags, cycles), and those that do not (keys that stand twice)."""
    fatal: list[Fault] = []
    faults: list[Fault] = []
    for node, is_cycle in _nodes(root, ()):
        where = f"{source}:{node.start_mark.line + 1}"
        if is_cycle:
            fatal.append(Fault(where, "an alias that contains itself has no end"))
        elif node.tag not in _PLAIN_TAGS:
            fatal.append(Fault(where, f"the tag {node.tag.replace(_TAG, '!!')} is not allowed; write plain values"))
        elif isinstance(node, yaml.MappingNode):
            first_line: dict[str, int] = {}
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if key.tag == _TAG + "merge":
                    continue
                if key.tag != _TAG + "str":
                    text = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                    fatal.append(Fault(f"{source}:{line}", f"a key must be text; got {text} (put it in quotes)"))
                elif key.value in first_line:
                    first = f"first in line {first_line[key.value]}"
                    message = f"the key {key.value!r} stands twice in one mapping ({first})"
                    faults.append(Fault(f"{source}:{line}", message))
                else:
                    first_line[key.value] = line
    return list(dict.fromkeys(fatal)), list(dict.fromkeys(faults))


def _nodes(node: yaml.Node, parents: tuple[yaml.Node, ...]) -> Iterator[tuple[yaml.Node, bool]]:
    """``node`` and the values under it, each with True where it contains itself."""
    if any(node is parent for parent in parents):
        yield node, True
        return
    yield node, False
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _nodes(child, (*parents, node))
    elif isinstance(node, yaml.MappingNode):
        for _, child in node.value:
            yield from _nodes(child, (*parents, node))
