"""``--only EXPR``: which runs of a sweep are asked for, in a small language of comparisons.

    seed == 0 and defense.kind == 'pps'
    'random' in label
    training.learning_rate < 1e-3 and not (seed in (1, 2))
    pps                                  a lone word, or anywhere a text in quotes: the label contains it

It is written as Python writes it and read by the code below; nothing of it is ever run.

- A name is a column of the table ``runs``: ``label`` (in the table ``run``), ``run_id``, or a setting. An item of a
  defense of several, ``defense.0.kind`` in the table, is written ``defense[0].kind``; ``defense.kind`` means all items.
  A setting that is a list is its JSON text, as in the table.
- A comparison is true if it holds for any value that the name has in the run: with several items, if any item fits. In
  a chain (``1 < defense.layer < 20``) one value must fit all over, but two comparisons joined by ``and`` may be met by
  two different items.
- Where a run lacks the field, every comparison with it is false, ``!=`` and ``not in`` too; ``not`` makes that true.
- A number, a text and a truth value are never equal to each other and have no order; to compare them all the same is a
  fault, unless the column has a fitting value in another run. An empty value (None) equals None alone.
"""

from __future__ import annotations

import ast
import itertools
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from analysis.manifest import RunEntry, Scalar
from engine.config_faults import nearest, show
from trainables.errors import Fault

KEY = "--only"

_Run: TypeAlias = Mapping[str, Scalar]

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALLOWED = (
    "allowed are names of columns, numbers, texts in quotes, True, False, None, lists of these, "
    "== != < <= > >= in, not in, and, or, not, parentheses"
)
_ADVICE = "write it like \"seed == 0 and defense.kind == 'pps'\", or as one text in quotes that the label contains"
_WORD = re.compile(r"[\w.#-]+")
_MAX_CHARACTERS = 60  # of a quoted part of the expression
_ITEM = re.compile(r"defense\.(\d+)\.(.+)")


def parse(text: str) -> tuple[ast.expr | None, list[Fault]]:
    """The expression that ``text`` says, or None and what is wrong with it as a text."""
    text = text.strip()
    if _WORD.fullmatch(text):
        return ast.Constant(text), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are about running it
            return ast.parse(text, mode="eval").body, []
    except SyntaxError as error:
        reason = str(error.msg) + (f" (character {error.offset})" if error.offset else "")
    except (ValueError, MemoryError, RecursionError) as error:
        reason = str(error) or "nested too deeply"
    return None, [Fault(KEY, f"{show(text)} cannot be read: {reason}; {_ADVICE}")]


def select(text: str, entries: Sequence[RunEntry]) -> tuple[frozenset[str], list[Fault]]:
    """Labels of those of ``entries`` that ``text`` asks for, and what is wrong with it; to ask for none is a fault."""
    tree, faults = parse(text)
    if tree is None:
        return frozenset(), faults
    runs: list[_Run] = [
        {"label": entry.label, "run": entry.label, "run_id": entry.run_id, **entry.config} for entry in entries
    ]
    reader = _Reader(runs)
    try:
        reader.check(tree)
        if reader.faults:
            return frozenset(), list(dict.fromkeys(reader.faults))
        chosen = frozenset(str(run["label"]) for run in runs if reader.holds(tree, run))
    except RecursionError:
        return frozenset(), [Fault(KEY, f"{show(text)} is nested too deeply")]
    if chosen:
        return chosen, []
    labels = ", ".join(repr(entry.label) for entry in entries)
    return chosen, [Fault(KEY, f"{show(text)} selects none of the {len(entries)} runs; their labels: {labels}")]


class _Reader:
    """Checks an expression against the runs of a sweep, then says of which of them it is true."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self.runs = runs
        self.faults: list[Fault] = []
        columns = dict.fromkeys(name for run in runs for name in run)
        of_all_items = [f"defense.{match[2]}" for name in columns if (match := _ITEM.fullmatch(name))]
        self.names = list(dict.fromkeys([*map(_written, columns), *of_all_items]))

    def check(self, node: ast.expr) -> None:
        """Note every fault of ``node``, which stands where something true or false is wanted."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self.check(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self.check(node.operand)
        elif isinstance(node, ast.Compare):
            self._check_comparison(node)
        elif _name(node) is not None:
            if self._is_known(node) and (kinds := self._kinds(node) - {"true or false"}):
                self._fault(f"{_text(node)} is {_either(kinds)}; compare it with something, or put a text in quotes")
        elif not (isinstance(node, ast.Constant) and isinstance(node.value, str | bool)):
            self._fault(f"{_text(node)} is neither true nor false; {_ALLOWED}")

    def holds(self, node: ast.expr, run: _Run) -> bool:
        """Whether ``node``, which has no fault, is true of ``run``."""
        if isinstance(node, ast.BoolOp):
            combine = all if isinstance(node.op, ast.And) else any
            return combine(self.holds(value, run) for value in node.values)
        if isinstance(node, ast.UnaryOp):
            return not self.holds(node.operand, run)
        if isinstance(node, ast.Compare):
            operands = [_values(operand, run) for operand in (node.left, *node.comparators)]
            return any(
                all(itertools.starmap(_compare, zip(node.ops, choice, choice[1:], strict=False)))
                for choice in itertools.product(*operands)
            )
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value in str(run["label"])
        return True in _values(node, run)

    def _check_comparison(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        readable = [self._is_operand(operand) for operand in operands]
        for index, op in enumerate(node.ops):
            if isinstance(op, ast.Is | ast.IsNot):
                self._fault(f"{_text(node)}: is compares nothing here; write == or !=")
            elif readable[index] and readable[index + 1]:
                left, right = operands[index], operands[index + 1]
                reason = self._why_never(op, left, right)
                if reason is not None:
                    pair = ast.Compare(left, [op], [right])
                    described = f"{self._described(left)}, {self._described(right)}"
                    self._fault(f"{_text(pair)}: {described}; {reason}")

    def _why_never(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> str | None:
        """Why the two cannot be compared like this in any run, or None. What is None in every run can always be."""
        one, other = self._kinds(left), self._kinds(right)
        if _is_list(left):
            return "a list stands to the right of in"
        if isinstance(op, ast.In | ast.NotIn) and not _is_list(right):
            sound = all("text" in kinds or not kinds for kinds in (one, other))
            return None if sound else "in looks for a text in a text, or in a list"
        if not isinstance(op, ast.In | ast.NotIn) and _is_list(right):
            return "with a list write in or not in"
        comparable = one & other
        if type(op) in _ORDER:
            comparable -= {"true or false"}
            if any(isinstance(side, ast.Constant) and side.value is None for side in (left, right)):
                return "None has no order"
        return "these never compare" if one and other and not comparable else None

    def _is_operand(self, node: ast.expr) -> bool:
        if _name(node) is not None:
            return self._is_known(node)
        try:
            _literal(node)
        except ValueError:
            self._fault(f"{_text(node)} cannot be compared; {_ALLOWED}")
            return False
        return True

    def _is_known(self, node: ast.expr) -> bool:
        name = _name(node)
        if name is None or any(_column_values(name, run) for run in self.runs):
            return True
        self._fault(f"no column {_text(node)} (a text is written in quotes); {nearest(_written(name), self.names)}")
        return False

    def _kinds(self, node: ast.expr) -> set[str]:
        """Kinds of all the values that ``node`` has in the runs; of a list, those of what is in it."""
        values = [value for run in self.runs for value in _values(node, run)]
        flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
        return {_kind(value) for value in flat if value is not None}

    def _described(self, node: ast.expr) -> str:
        if _is_list(node):
            return f"{_text(node)} is a list"
        return f"{_text(node)} is {_either(self._kinds(node)) or 'empty'}"

    def _fault(self, message: str) -> None:
        self.faults.append(Fault(KEY, message))


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    if type(op) in _ORDER:
        return _same_kind(left, right) and left is not None and _ORDER[type(op)](left, right)
    if isinstance(op, ast.In | ast.NotIn):
        if isinstance(right, tuple):
            found = any(_same_kind(left, item) and left == item for item in right)
        elif isinstance(left, str) and isinstance(right, str):
            found = left in right
        else:
            return False  # an empty value is like none
        return found == isinstance(op, ast.In)
    return (_same_kind(left, right) and left == right) == isinstance(op, ast.Eq)


def _values(node: ast.expr, run: _Run) -> tuple[Any, ...]:
    """What ``node`` stands for in ``run``: the values of a column, or the one of a literal (a list is a tuple)."""
    name = _name(node)
    return (_literal(node),) if name is None else _column_values(name, run)


def _column_values(name: str, run: _Run) -> tuple[Scalar, ...]:
    if name in run:
        return (run[name],)
    item = _ITEM.fullmatch(name)
    if item is not None:  # the first item of a single one stands without a number
        single = f"defense.{item[2]}"
        return (run[single],) if int(item[1]) == 0 and single in run else ()
    return tuple(
        value
        for column, value in run.items()
        if (item := _ITEM.fullmatch(column)) is not None and name == f"defense.{item[2]}"
    )


def _name(node: ast.expr) -> str | None:
    """The column that ``node`` names, as the table writes it, or None if it is no name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        of = _name(node.value)
        return None if of is None else f"{of}.{node.attr}"
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and type(node.slice.value) is int:
        of = _name(node.value)
        return None if of is None else f"{of}.{node.slice.value}"
    return None


def _literal(node: ast.expr) -> Any:
    """The value that ``node`` writes out. Raises ValueError if it is anything else."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        items = tuple(_literal(item) for item in node.elts)
        if not any(isinstance(item, tuple) for item in items):
            return items
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = _literal(node.operand)
        if _kind(number) == "a number":
            return -number if isinstance(node.op, ast.USub) else number
    elif isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    raise ValueError("not a literal")


def _is_list(node: ast.expr) -> bool:
    return isinstance(node, ast.Tuple | ast.List | ast.Set)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, str):
        return "text"
    return "a number" if isinstance(value, int | float) else "nothing"


def _same_kind(left: Any, right: Any) -> bool:
    return _kind(left) == _kind(right)


def _written(column: str) -> str:
    """A column as the expression writes it: ``defense.0.kind`` is ``defense[0].kind``."""
    return _ITEM.sub(r"defense[\1].\2", column)


def _text(node: ast.expr) -> str:
    text = ast.unparse(node)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 4]} ..."


def _either(kinds: set[str]) -> str:
    return " or ".join(sorted(kinds))
