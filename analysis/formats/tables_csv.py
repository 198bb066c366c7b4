"""Answers with scores as CSV, as persona_vectors and emergent-misalignment write them.

``question,answer,question_id`` and a column per score from 0 to 100 (``{trait},coherence``; ``aligned,coherent``);
persona_vectors has ``prompt`` too and appends projections, ``{model}_{vector}_{proj,cos_sim,...}_layer{l}``.
An empty cell is a refusal or a failure, and the file does not say which: the status is ``unrecorded``.
"""

from __future__ import annotations

import re

from analysis.formats.answers import SCORE, Numbering, answer_row, cell_score, metric_name, repeated
from analysis.formats.base import Foreign, Format, Hints, Imported, ImportedScore, MadeAnswers, raise_faults
from trainables.errors import Fault
from trainables.rows import GenerationRow

NEEDED = ("question", "answer", "question_id")
_TEXT = (*NEEDED, "prompt")
_PROJECTION = re.compile(r".+_(proj|prompt_last_proj|cos_sim)_layer\d+")


class ScoresCsv(Format):
    name = "scores-csv"
    what = "answers with scores of persona_vectors or emergent-misalignment (.csv: question, answer, question_id, ...)"

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        return file.suffix == ".csv" and set(NEEDED) <= set(file.header)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        del hints
        columns = [name for name in file.header if name and name not in _TEXT]
        names = {column: metric_name(column) for column in columns}
        faults: list[Fault] = repeated(file, [*file.header, *(set(names.values()) & set(_TEXT))])
        faults += repeated(file, list(names.values()))
        scales = {column: None if _PROJECTION.fullmatch(column) else SCORE for column in columns}
        if not any(scales.values()):
            faults.append(file.fault(f"no column of scores beside {', '.join(file.header)}"))
        raise_faults(faults)
        numbering = Numbering()
        answers: list[GenerationRow] = []
        scores: dict[str, list[ImportedScore]] = {names[column]: [] for column in columns}
        for line, row in file.records:
            question_id = row["question_id"]
            if not question_id:
                faults.append(file.fault("question_id is empty", str(line)))
                continue
            index = numbering.next(question_id)
            answers.append(answer_row(question_id, index, row["question"], row["answer"]))
            for column in columns:
                score = cell_score(file, line, column, row[column], answers[-1], scales[column])
                if isinstance(score, Fault):
                    faults.append(score)
                else:
                    scores[names[column]].append(score)
        if not answers and not faults:
            faults.append(file.fault("holds no answer"))
        raise_faults(faults)
        judged = [column for column in columns if scales[column] is not None]
        empty = sum(score.status != "ok" for column in judged for score in scores[names[column]])
        lines = [
            f"{len(answers)} answers to {len({answer.question_id for answer in answers})} questions; "
            f"scores from 0 to 100: {', '.join(judged)}",
            f"{empty} empty cells: a refusal or a failure, which is not recorded (status unrecorded)",
        ]
        if len(judged) < len(columns):
            lines.append(f"{len(columns) - len(judged)} columns of projections, kept as metrics without a scale")
        if "prompt" in file.header:
            lines.append("not used: prompt (the question with its chat template)")
        made = MadeAnswers(
            file.name,
            tuple(answers),
            {name: tuple(values) for name, values in scores.items()},
            {names[column]: scale for column, scale in scales.items() if scale is not None},
        )
        return Imported(self.name, (made,), tuple(lines))
