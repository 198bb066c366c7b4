"""Tables: schemas from row classes, round trips, and what is refused when written and when read."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
from analysis.rows import STATUSES, LossRow, ScoreRow
from analysis.tables import TABLES, describe, read_parquet, schema_of, table_key, to_parquet_bytes
from analysis.weight_rows import WeightProfileRow, WeightSizeRow
from trainables.errors import StoreError
from trainables.rows import GenerationRow, SignalRow, TrainingRow

GENERATION = GenerationRow(
    sample_id="a" * 12,
    question_id="q1",
    sample_index=0,
    question="Why?",
    system_prompt=None,
    answer="Because é\n",
    num_tokens=3,
    finish_reason="stop",
)
TRAINING = TrainingRow(
    train_id="c" * 12,
    step=1,
    epoch=0.5,
    loss=2.5,
    gradient_norm=1.0,
    learning_rate=1e-3,
    num_tokens=100,
    num_loss_tokens=50,
    seconds=4.5,
)
SCORE = ScoreRow(
    judge_id="b" * 12,
    sample_id="a" * 12,
    question_id="q1",
    sample_index=0,
    value=None,
    status="refused",
    judge="rule",
    reply="I cannot",
)
LOSS = LossRow(measure_id="d" * 12, row=0, condition="none", num_tokens=4, loss_sum=2.0, loss_mean=0.5)


def example(cls: type) -> Any:
    """A row with another value in every column of a type, and no value where none is needed."""
    values: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for number, field in enumerate(dataclasses.fields(cls), start=1):
        kind = hints[field.name]
        values[field.name] = kind(number) if kind in (int, float, str) else None
    return cls(**values)


ROWS: dict[str, Any] = {
    "training": TRAINING,
    "signals": SignalRow(train_id="c" * 12, step=1, signal="penalty", name="held", layer=None, value=0.25),
    "generations": GENERATION,
    "scores": SCORE,
    "losses": LOSS,
    "gradients": example(GradientRow),
    "similarities": example(SimilarityRow),
    "projections": example(ProjectionRow),
    "components": example(ComponentRow),
    "component_scores": example(ComponentScoreRow),
    "activation_changes": example(ActivationChangeRow),
    "predictions": example(PredictionRow),
    "weight_profiles": example(WeightProfileRow),
    "weight_sizes": example(WeightSizeRow),
    "axis_alignments": example(AxisAlignmentRow),
    "axis_summary": example(AxisSummaryRow),
    "axis_tests": example(AxisTestRow),
    "cap_stability": example(CapStabilityRow),
    "drift": example(DriftRow),
}


def write(path: Path, table: str, rows: list[Any]) -> Path:
    path.write_bytes(to_parquet_bytes(table, rows))
    return path


@pytest.mark.parametrize("table", TABLES)
def test_rows_come_back_as_they_were(table: str, tmp_path: Path) -> None:
    found = read_parquet(write(tmp_path / "x=1.parquet", table, [ROWS[table]] * 2), table)
    assert [TABLES[table](**row) for row in found.to_pylist()] == [ROWS[table]] * 2
    assert found.schema.equals(schema_of(table), check_metadata=True)


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_has_its_columns(table: str, tmp_path: Path) -> None:
    found = read_parquet(write(tmp_path / "t.parquet", table, []), table)
    assert found.num_rows == 0
    assert found.schema == schema_of(table)


def test_types_nulls_units_and_meanings_come_from_the_row_class() -> None:
    schema = schema_of("generations")
    assert schema.names == [field.name for field in dataclasses.fields(GenerationRow)]
    assert schema.field("num_tokens").type == pa.int64()
    assert schema.field("num_tokens").metadata[b"unit"] == b"tokens"
    assert schema.field("answer").metadata[b"meaning"] == b"the decoded answer without end marks"
    assert [field.name for field in schema if field.nullable] == ["system_prompt", "num_tokens"]
    assert schema_of("losses").field("loss_sum").type == pa.float64()


def test_every_column_of_every_table_is_described() -> None:
    columns = describe()
    assert {column.table for column in columns} == {*TABLES, "runs", "agreement", "extractions", "capping"}
    assert all(column.meaning for column in columns)
    (column,) = [column for column in columns if (column.table, column.name) == ("losses", "loss_mean")]
    assert (column.type, column.unit, column.nullable) == (float, "nats/token", False)


def test_the_key_of_a_table() -> None:
    assert table_key("scores", "ab12") == "tables/scores/ab12.parquet"
    with pytest.raises(
        StoreError, match="no stored table 'runs'; there are training, signals, generations, scores, losses"
    ):
        table_key("runs", "ab12")


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("generations", "num_tokens", 1.0),
        ("generations", "num_tokens", True),
        ("generations", "num_tokens", 2**63),
        ("generations", "answer", None),
        ("generations", "answer", b"bytes"),
        ("generations", "answer", "half a pair \ud800"),
        ("generations", "system_prompt", 3),
        ("training", "loss", "2.5"),
        ("training", "loss", False),
    ],
)
def test_a_wrong_value_is_named_with_its_table_and_column(table: str, column: str, value: object) -> None:
    row = dataclasses.replace(ROWS[table], **{column: value})
    with pytest.raises(StoreError) as caught:
        to_parquet_bytes(table, [ROWS[table], row])
    for part in (f"table '{table}'", f"column '{column}'", "row 1", repr(value)):
        assert part in str(caught.value)


def test_an_int_may_stand_for_a_float(tmp_path: Path) -> None:
    row = dataclasses.replace(TRAINING, learning_rate=0)
    found = read_parquet(write(tmp_path / "t.parquet", "training", [row]), "training")
    assert found.column("learning_rate").to_pylist() == [0.0]


def test_rows_of_another_table_are_refused() -> None:
    with pytest.raises(StoreError, match="row 1 for table 'losses' is a ScoreRow, not a LossRow"):
        to_parquet_bytes("losses", [LOSS, SCORE])


def test_a_file_with_other_columns_is_refused_by_name(tmp_path: Path) -> None:
    good = pa.Table.from_pylist([dataclasses.asdict(LOSS)], schema=schema_of("losses"))
    wrong = {
        "column 'row' is missing": good.drop_columns(["row"]),
        "column 'extra' is not declared": good.append_column("extra", pa.array([1])),
        "column 'row' is string, not int64": good.set_column(1, "row", pa.array(["0"])),
        "column 'loss_sum' has nulls": good.set_column(4, "loss_sum", pa.array([None], pa.float64())),
    }
    for message, table in wrong.items():
        path = tmp_path / "wrong.parquet"
        pq.write_table(table, path)
        with pytest.raises(StoreError) as caught:
            read_parquet(path, "losses")
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


def test_columns_in_another_order_are_the_same_table(tmp_path: Path) -> None:
    good = pa.Table.from_pylist([dataclasses.asdict(LOSS)], schema=schema_of("losses"))
    pq.write_table(good.select(good.column_names[::-1]), tmp_path / "t.parquet")
    assert read_parquet(tmp_path / "t.parquet", "losses").equals(good)


def test_a_file_that_is_torn_or_missing_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", "losses", [LOSS])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StoreError, match=r"t\.parquet: cannot be read as a parquet file"):
        read_parquet(path, "losses")
    with pytest.raises(StoreError, match=r"gone\.parquet: not there"):
        read_parquet(tmp_path / "gone.parquet", "losses")


def test_a_score_row_cannot_be_ok_without_a_value_nor_of_an_unknown_status() -> None:
    for status in STATUSES[1:]:
        assert dataclasses.replace(SCORE, status=status).value is None
    for value in (None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="needs a finite value"):
            dataclasses.replace(SCORE, status="ok", value=value)
    with pytest.raises(ValueError, match="'fine' is not one of ok, refused"):
        dataclasses.replace(SCORE, status="fine")
