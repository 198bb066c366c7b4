"""Rows of the tables about directions and changes of weights, declared as in trainables/rows.py."""

from __future__ import annotations

from dataclasses import dataclass

from trainables.rows import column

DELTA = "delta"


@dataclass(frozen=True, kw_only=True)
class WeightProfileRow:
    """How large something is in weight space, at the modules of one kind of one layer."""

    measure_id: str = column("identity of the measuring task")
    what: str = column("delta: what the finetuning changed; else the name of a direction")
    layer: int = column("0: the embeddings; l >= 1: decoder block l - 1; one more than there are blocks: what follows")
    module: str = column("last name of the modules, such as q_proj")
    num_parameters: int = column("parameters there")
    sum_of_squares: float = column("sum of their squares; its root is the L2 norm")
    largest: float = column("greatest size of an entry")


@dataclass(frozen=True, kw_only=True)
class WeightSizeRow:
    """How many entries have a size within some bounds."""

    measure_id: str = column("identity of the measuring task")
    what: str = column("delta: what the finetuning changed, at the matrices that have an adapter; else a direction")
    low: float = column("least size of an entry that is counted here; the first row, from 0, counts what is smaller")
    high: float = column("the size that an entry must be below")
    num_entries: int = column("entries with such a size")
