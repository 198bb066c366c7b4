"""Role files of assistant-axis: instructions to play a character, without an opposite.

``{"instruction": [{"pos": ...}], "eval_prompt": ...}``. The questions of all roles are in one file of the project,
``data/extraction_questions.jsonl``. The judge's prompt asks for 0 to 3, which none of our judges reads: it is left out.
"""

from __future__ import annotations

from pathlib import Path

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeTrait, raise_faults
from analysis.formats.persona_trait import ignored, make_trait, numbered, pair_faults
from trainables.errors import ConfigError

QUESTIONS = "extraction_questions.jsonl"


class AxisRole(Format):
    name = "axis-role"
    what = "a role of assistant-axis (.json: instruction with pos alone, eval_prompt)"
    hints = frozenset({"questions"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        if file.suffix != ".json" or not isinstance(file.json, dict) or "questions" in file.json:
            return False
        pairs = file.json.get("instruction")
        return isinstance(pairs, list) and all(isinstance(pair, dict) and "neg" not in pair for pair in pairs)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        raw = file.json
        faults = list(pair_faults(file, raw["instruction"], ("pos",)))
        place = hints.questions or next(
            (folder / QUESTIONS for folder in file.path.absolute().parents[:3] if (folder / QUESTIONS).is_file()), None
        )
        questions: list[str] = []
        if place is None:
            flag = Hints.flag("questions")
            faults.append(
                file.fault(f"a role has no questions of its own; give {flag} FILE, the project's {QUESTIONS}")
            )
        else:
            try:
                questions = read_questions(place)
            except ConfigError as error:
                faults += error.faults
        raise_faults(faults)
        prompts = [pair["pos"] for pair in raw["instruction"]]
        trait = make_trait(
            file,
            {
                "name": file.name,
                "description": f"Plays the role {file.name}.",
                "questions": numbered(file.name, questions),
                "inoculation_prompts": prompts,
            },
            {},
        )
        convention = [
            f"{len(prompts)} instructions to play the role, as inoculation prompts",
            f"{len(questions)} questions of {place}",
            "the judge's prompt is on a scale from 0 to 3 and is left out: give the trait a judge_prompt from 0 to 100",
            *ignored(raw, {"instruction", "eval_prompt"}),
        ]
        return Imported(self.name, (MadeTrait(file.name, trait),), tuple(convention))


def read_questions(path: Path) -> list[str]:
    """The questions of a JSONL file: a text, or an object with ``question``, per line."""
    file = Foreign(path)
    questions, faults = [], []
    for number, row in file.lines:
        text = row.get("question") if isinstance(row, dict) else row
        if isinstance(text, str) and text.strip():
            questions.append(text)
        else:
            faults.append(file.fault('must be a text, or an object {"question": text}', str(number)))
    if not questions and not faults:
        faults.append(file.fault("holds no question"))
    raise_faults(faults)
    return questions
