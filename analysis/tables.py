"""The stored tables: parquet schemas derived from row classes, a writer and a reader that check them.

Every table is declared once, by a dataclass made with ``trainables.rows.column``. A table of a task is the file
``tables/<table>/<task id>.parquet`` of the store.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import types
import typing
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.measured_rows import (
    ActivationChangeRow,
    AxisAlignmentRow,
    AxisSummaryRow,
    AxisTestRow,
    CapStabilityRow,
    ComponentRow,
    ComponentScoreRow,
    DriftRow,
    GradientRow,
    PredictionRow,
    ProjectionRow,
    SimilarityRow,
)
from analysis.remote import Location, Remote
from analysis.rows import AgreementRow, CappingRow, ExtractionRow, LossRow, RunRow, ScoreRow
from analysis.weight_rows import WeightProfileRow, WeightSizeRow
from trainables.errors import StoreError
from trainables.rows import GenerationRow, SignalRow, TrainingRow

TABLES: dict[str, type] = {
    "training": TrainingRow,
    "signals": SignalRow,
    "generations": GenerationRow,
    "scores": ScoreRow,
    "losses": LossRow,
    "gradients": GradientRow,
    "similarities": SimilarityRow,
    "projections": ProjectionRow,
    "components": ComponentRow,
    "component_scores": ComponentScoreRow,
    "activation_changes": ActivationChangeRow,
    "predictions": PredictionRow,
    "weight_profiles": WeightProfileRow,
    "weight_sizes": WeightSizeRow,
    "axis_alignments": AxisAlignmentRow,
    "axis_summary": AxisSummaryRow,
    "axis_tests": AxisTestRow,
    "cap_stability": CapStabilityRow,
    "drift": DriftRow,
}
"""The tables that are stored, with the class of their rows."""

_DERIVED: dict[str, type] = {
    "runs": RunRow,
    "agreement": AgreementRow,
    "extractions": ExtractionRow,
    "capping": CappingRow,
}
_ARROW_TYPES: dict[type, Any] = {int: pa.int64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}


@dataclasses.dataclass(frozen=True)
class Column:
    """What is declared of one column. ``type`` is int, float, str or bool."""

    table: str
    name: str
    type: type
    nullable: bool
    unit: str
    meaning: str


def table_key(table: str, task_id: str) -> str:
    """The store's key of the table that this task made."""
    row_class(table)
    return f"tables/{table}/{task_id}.parquet"


def row_class(table: str) -> type:
    """The class of a stored table's rows. Raises StoreError for a table that is not stored."""
    if table not in TABLES:
        raise StoreError(f"there is no stored table {table!r}; there are {', '.join(TABLES)}")
    return TABLES[table]


@functools.cache
def columns_of(table: str) -> tuple[Column, ...]:
    """The declared columns of a stored table or of the derived table ``runs``, in order."""
    cls = _DERIVED.get(table) or row_class(table)
    hints = typing.get_type_hints(cls)
    columns = []
    for field in dataclasses.fields(cls):
        value_type, nullable = _unpack(hints[field.name], f"{cls.__name__}.{field.name}")
        unit, meaning = field.metadata["unit"], field.metadata["meaning"]
        columns.append(Column(table, field.name, value_type, nullable, unit, meaning))
    return tuple(columns)


@functools.cache
def schema_of(table: str) -> pa.Schema:
    """The parquet schema of a table; unit and meaning stand in each field's metadata."""
    return pa.schema(
        [
            pa.field(
                column.name,
                _ARROW_TYPES[column.type],
                nullable=column.nullable,
                metadata={"unit": column.unit, "meaning": column.meaning},
            )
            for column in columns_of(table)
        ],
        metadata={"table": table},
    )


def describe() -> tuple[Column, ...]:
    """Every declared column of every table, the fixed columns of the derived table ``runs`` among them."""
    return tuple(column for table in (*TABLES, *_DERIVED) for column in columns_of(table))


def to_parquet_bytes(table: str, rows: Sequence[object]) -> bytes:
    """The rows as a parquet file; no rows make a valid empty table.

    Raises StoreError that names table, column and value for a value of another type than declared (an int may stand
    for a float), and for a null where none is allowed.
    """
    cls = row_class(table)
    for index, row in enumerate(rows):
        if not isinstance(row, cls):
            raise StoreError(
                f"row {index} for table {table!r} is a {type(row).__name__}, not a {cls.__name__}: {row!r}"
            )
    arrays = [_array(column, [getattr(row, column.name) for row in rows]) for column in columns_of(table)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema_of(table)), buffer, compression="zstd")
    return buffer.getvalue()


def read_parquet(path: Location, table: str) -> pa.Table:
    """A stored table with its columns in declared order and the declared schema.

    Raises StoreError that names the file if it is not there, is no parquet file, or has other columns than declared.
    """
    schema = schema_of(table)
    try:
        with pq.ParquetFile(io.BytesIO(path.read_bytes()) if isinstance(path, Remote) else path) as file:
            found = file.read()
    except FileNotFoundError as error:
        raise StoreError(f"{path}: not there; run the sweep (again) to make it") from error
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read as a parquet file ({error}); {_REMEDY}") from error
    faults = _schema_faults(found, schema)
    if faults:
        raise StoreError(f"{path}: not the table {table!r} of this version: {'; '.join(faults)}; {_REMEDY}")
    return found.select(schema.names).cast(schema)


_REMEDY = "remove the file and run the sweep again to make it anew"


def _unpack(hint: Any, name: str) -> tuple[type, bool]:
    """(type, nullable) of an annotation ``X`` or ``X | None``."""
    nullable = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        others = [option for option in options if option is not types.NoneType]
        nullable = len(others) < len(options)
        hint = others[0] if len(others) == 1 else hint
    if hint not in _ARROW_TYPES:
        raise TypeError(f"{name}: a column is an int, float, str or bool, or one of them | None, not {hint}")
    return hint, nullable


def _array(column: Column, values: list[Any]) -> pa.Array:
    allowed = (int, float) if column.type is float else column.type
    for index, value in enumerate(values):
        if value is None and column.nullable:
            continue
        # bool is a subclass of int, but true and false are no numbers of a table
        if not isinstance(value, allowed) or (isinstance(value, bool) and column.type is not bool):
            raise _value_error(column, index, value)
    try:
        if column.type is float:
            values = [None if value is None else float(value) for value in values]
        return pa.array(values, type=_ARROW_TYPES[column.type], from_pandas=False)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        # an int beyond 64 bits or a text that is not Unicode: find it
        for index, value in enumerate(values):
            try:
                pa.array([value], type=_ARROW_TYPES[column.type])
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                raise _value_error(column, index, value) from error
        raise


def _value_error(column: Column, index: int, value: object) -> StoreError:
    declared = column.type.__name__ + (" or null" if column.nullable else "")
    shown = repr(value) if len(repr(value)) <= 200 else repr(value)[:200] + "..."
    return StoreError(
        f"table {column.table!r}, column {column.name!r}, row {index}: {shown} ({type(value).__name__}) "
        f"is not a valid {declared}"
    )


def _schema_faults(found: pa.Table, schema: pa.Schema) -> list[str]:
    faults = [f"column {name!r} is missing" for name in schema.names if name not in found.schema.names]
    faults += [f"column {name!r} is not declared" for name in found.schema.names if name not in schema.names]
    for field in schema:
        for other in (other for other in found.schema if other.name == field.name):
            if other.type != field.type:
                faults.append(f"column {field.name!r} is {other.type}, not {field.type}")
            elif not field.nullable and found.column(field.name).null_count:
                faults.append(f"column {field.name!r} has nulls")
    return faults
