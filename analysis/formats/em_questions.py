"""Questions of emergent-misalignment: a YAML list with paraphrases and prompts of judges from 0 to 100.

``{id, type: free_form_judge_0_100, paraphrases, samples_per_paraphrase, system?, judge, judge_prompts: {name: text}}``.
A trait of ours has one judge's prompt, so every name of ``judge_prompts`` makes a trait with the same questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeTrait, raise_faults
from analysis.formats.persona_trait import make_trait, text_faults
from trainables.errors import Fault

_KNOWN = {"id", "type", "paraphrases", "samples_per_paraphrase", "system", "judge", "judge_prompts", "temperature"}
_TYPES = ("free_form_judge_0_100", "free_form_judge", "free_form")


class EmQuestions(Format):
    name = "em-questions"
    what = "questions of emergent-misalignment (.yaml: a list with id, paraphrases, judge_prompts)"

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        if file.suffix not in (".yaml", ".yml"):
            return False
        raw = file.yaml
        return isinstance(raw, list) and any(isinstance(item, dict) and "paraphrases" in item for item in raw)

    def read(self, file: Foreign, hints: Hints) -> Imported:
        del hints
        items = file.yaml
        raise_faults(list(_faults(file, items)))
        questions = [
            {"id": item["id"] if len(item["paraphrases"]) == 1 else f"{item['id']}_{number}", "question": text}
            for item in items
            for number, text in enumerate(item["paraphrases"])
        ]
        prompts: dict[str, str] = {}
        for item in items:
            prompts |= item.get("judge_prompts") or {}
        first = next(iter(prompts), None)
        made = []
        for judge in prompts or [None]:
            name = file.name if judge == first else f"{file.name}-{judge}"
            raw: dict[str, Any] = {
                "name": name,
                "description": f"Judged by the prompt {judge!r} of {file.path.name}." if judge else file.path.name,
                "questions": questions,
            }
            if judge is not None:
                raw["judge_prompt"] = prompts[judge]
            made.append(MadeTrait(name, make_trait(file, raw, {"judge_prompt": f"judge_prompts.{judge}"})))
        samples = sorted({int(item.get("samples_per_paraphrase", 1)) for item in items})
        systems = {item.get("system") for item in items}
        convention = [
            f"{len(questions)} questions; judges' prompts: {', '.join(prompts) or 'none'}, a trait each",
            f"samples per question there: {', '.join(map(str, samples))} (evaluation.samples)",
        ]
        if systems != {None}:
            convention.append(
                f"their system prompt is not in the trait; set evaluation.system_prompt: {systems.pop()!r}"
            )
        return Imported(self.name, tuple(made), tuple(convention))


def _faults(file: Foreign, items: list[Any]) -> Iterator[Fault]:
    for index, item in enumerate(items):
        key = f"[{index}]"
        if not isinstance(item, dict):
            yield file.fault("must be an object with id and paraphrases", key)
            continue
        if not isinstance(item.get("id"), str) or not item["id"].strip():
            yield file.fault("must be a text", f"{key}.id")
        yield from text_faults(file, item.get("paraphrases"), f"{key}.paraphrases")
        kind = item.get("type", _TYPES[0])
        if kind not in _TYPES:
            yield file.fault(f"{kind!r} is not read; allowed: {', '.join(_TYPES)}", f"{key}.type")
        samples = item.get("samples_per_paraphrase", 1)
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            yield file.fault(f"must be a whole number from 1; got {samples!r}", f"{key}.samples_per_paraphrase")
        prompts = item.get("judge_prompts", {})
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            yield file.fault("must be texts by name", f"{key}.judge_prompts")
        if others := sorted(str(name) for name in set(item) - _KNOWN):
            yield file.fault(f"unknown; known: {', '.join(sorted(_KNOWN))}", f"{key}.{others[0]}")
    sound = [item for item in items if isinstance(item, dict)]
    for name in ("system", "judge_prompts"):
        if len({repr(item.get(name)) for item in sound}) > 1:
            yield file.fault(
                f"{name} differs from question to question; split the file, as one evaluation has one {name}"
            )
