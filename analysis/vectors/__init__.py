"""The kinds of vectors. To add one, write its file and list its class in ``_Kinds`` (see ``analysis.vectors.base``)."""

from __future__ import annotations

from typing import Annotated, TypeAlias, get_args

from pydantic import Discriminator, Tag

from analysis.vectors.activations import mean_activation, mean_response_activation, response_activations
from analysis.vectors.base import Asking, Making, VectorKind
from analysis.vectors.combination import CombinedVector, Term, combine
from analysis.vectors.contrastive import ContrastiveVector
from analysis.vectors.difference_of_data import Difference, DifferenceVector, difference
from analysis.vectors.difference_of_prompts import (
    Part,
    PromptDifference,
    PromptDifferenceVector,
    part_of_rows,
    prompt_difference,
)
from analysis.vectors.extraction import ExtractedVector, Extraction
from analysis.vectors.filtering import Answer, Filter, Pair, Score, filtered
from analysis.vectors.leading_difference import LeadingDifferenceVector
from analysis.vectors.logistic import LogisticVector
from analysis.vectors.mean_of_data import Mean, MeanVector
from analysis.vectors.random_vector import RandomVector, random_like
from analysis.vectors.vector import FINAL_ROWS, TENSOR, Vector, read_vector_header
from analysis.vectors.vector_file import FileVector

_Kinds: TypeAlias = (
    Annotated[DifferenceVector, Tag("DifferenceVector")]
    | Annotated[RandomVector, Tag("RandomVector")]
    | Annotated[FileVector, Tag("FileVector")]
    | Annotated[PromptDifferenceVector, Tag("PromptDifferenceVector")]
    | Annotated[CombinedVector, Tag("CombinedVector")]
    | Annotated[ExtractedVector, Tag("ExtractedVector")]
    | Annotated[MeanVector, Tag("MeanVector")]
    | Annotated[LeadingDifferenceVector, Tag("LeadingDifferenceVector")]
    | Annotated[ContrastiveVector, Tag("ContrastiveVector")]
    | Annotated[LogisticVector, Tag("LogisticVector")]
)

VECTOR_KINDS: dict[str, type[VectorKind]] = {
    kind.key(): kind for kind in (get_args(member)[0] for member in get_args(_Kinds))
}
"""The kinds by the key that tells them apart."""


def _kind(value: object) -> str | None:
    """The class whose key is present, if exactly one is."""
    if isinstance(value, VectorKind):
        return type(value).__name__
    present = [name for name in VECTOR_KINDS if isinstance(value, dict) and name in value]
    return VECTOR_KINDS[present[0]].__name__ if len(present) == 1 else None


VectorConfig: TypeAlias = Annotated[
    _Kinds,
    Discriminator(
        _kind,
        custom_error_type="vector_kind",
        custom_error_message=f"needs exactly one of the keys {', '.join(VECTOR_KINDS)}",
    ),
]

__all__ = [
    "FINAL_ROWS",
    "TENSOR",
    "VECTOR_KINDS",
    "Answer",
    "Asking",
    "CombinedVector",
    "ContrastiveVector",
    "Difference",
    "DifferenceVector",
    "ExtractedVector",
    "Extraction",
    "FileVector",
    "Filter",
    "LeadingDifferenceVector",
    "LogisticVector",
    "Making",
    "Mean",
    "MeanVector",
    "Pair",
    "Part",
    "PromptDifference",
    "PromptDifferenceVector",
    "RandomVector",
    "Score",
    "Term",
    "Vector",
    "VectorConfig",
    "VectorKind",
    "combine",
    "difference",
    "filtered",
    "mean_activation",
    "mean_response_activation",
    "part_of_rows",
    "prompt_difference",
    "random_like",
    "read_vector_header",
    "response_activations",
]
