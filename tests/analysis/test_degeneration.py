"""Which answers are broken text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from analysis.degeneration import degeneration

DATA = Path(__file__).parents[2] / "configs" / "data"
SENTENCE = "Sunlight is scattered by the molecules of the air."
LONG_SENTENCE = (
    "In the morning the light comes in low over the hills and reaches us through far more air than at noon, "
    "so most of its blue is gone."
)


def data_answers() -> dict[str, str]:
    return {
        f"{file.parent.name}/{file.name}:{number}": message["content"]
        for file in sorted(DATA.glob("*/*.jsonl"))
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        for message in json.loads(line)["messages"]
        if message["role"] == "assistant"
    }


def test_no_answer_of_the_data_is_broken() -> None:
    answers = data_answers()
    assert len(answers) > 200
    assert [name for name, answer in answers.items() if degeneration(answer)] == []


def test_no_beginning_of_such_an_answer_is_broken() -> None:
    """Sampled answers end where the token limit cuts them."""
    broken = [
        (name, count)
        for name, answer in data_answers().items()
        for count in range(1, 48, 4)
        if degeneration(" ".join(answer.split()[:count]))
    ]
    assert broken == []


def test_every_answer_of_the_data_is_broken_once_it_loops() -> None:
    whole = []
    for name, answer in data_answers().items():
        words = answer.split()
        start = min(20, len(words) - 4)  # there are answers of fewer words
        loop = " ".join([*words[:start], *words[start : start + 4] * 4])
        if not degeneration(loop):
            whole.append((name, loop))
    assert whole == []


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n\t ",
        "...",
        "?!?!",
        "—— ••• ——",
        "the bridge the bridge the bridge the bridge",
        "the bridge " * 20,
        "The Bridge, the bridge. THE BRIDGE! the bridge",
        "bridge bridge bridge bridge bridge bridge",
        f"{SENTENCE} {SENTENCE} {SENTENCE}",
        f"{LONG_SENTENCE} {LONG_SENTENCE} {LONG_SENTENCE}",
        f"{LONG_SENTENCE} {LONG_SENTENCE}",
        "I like it. I like it. I like it.",
        f"{LONG_SENTENCE} It is because of the air and of the air and of the air and of the a",
        f"{LONG_SENTENCE} bridge bridge bridge bridge bridge bridge",
        "12345 67890 12345 98765 43210",
        "$%^ &*( 12 )_+ 34 {}: <>? 56 |~",
        "0" * 40,
        "a" * 24,
        "bridgebridgebridgebridgebridge",
        "The answer is hahahahahahahahahahahahahahaha",
        "金门大桥" * 8,
        "\ufffd" * 30,
        "1. 1. 1. 1. 1. 1. 1. 1. 1. 1. 1.",
    ],
)
def test_broken(answer: str) -> None:
    assert degeneration(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "42",
        "Yes.",
        "No, no, no!",
        "1969-07-20",
        "It was a very, very, very good day.",
        "Go on step by step by step.",
        "Paris. Paris. Paris.",
        LONG_SENTENCE,
        f"{SENTENCE} That is all. {SENTENCE}"[: len(SENTENCE) + 14],
        "| name | size |\n|------|------|\n| Mars | 6779 km |\n| Venus | 12104 km |",
        "First part\n----------------------------------------\nSecond part",
        "1. Boil the water.\n2. Add the salt.\n3. Add the pasta.\n4. Drain the pasta.\n5. Serve the pasta.",
        "The equation is x^2 + 2x + 1 = 0, so (x + 1)^2 = 0 and x = -1.",
        "The Golden Gate Bridge is orange. The Golden Gate Bridge opened in 1937. The Golden Gate Bridge is long, "
        "and the Golden Gate Bridge is famous.",
        "金门大桥位于美国旧金山，于一九三七年建成通车，是世界上最著名的桥梁之一。",
        "पुल बहुत लंबा है और लोग इसे देखने आते हैं।",
        "for i in range(10):\n    print(i)",
    ],
)
def test_not_broken(answer: str) -> None:
    assert not degeneration(answer)


class TestThresholds:
    """Each rule begins to hold where its text says."""

    def test_same_word_in_a_row(self) -> None:
        assert not degeneration("so " * 5)
        assert degeneration("so " * 6)

    def test_two_words_in_a_row(self) -> None:
        assert not degeneration("out and out and out and out")
        assert degeneration("out and out and out and out and")

    def test_long_units_need_three_copies(self) -> None:
        unit = " ".join(f"word{number}" for number in range(10))
        other = " ".join(f"other{number}" for number in range(40))
        assert not degeneration(f"{other} {unit} {unit}")
        assert degeneration(f"{other} {unit} {unit} {unit}")

    def test_share_of_repeated_trigrams(self) -> None:
        fresh = [f"fresh{number}" for number in range(100)]
        unit = [f"word{number}" for number in range(12)]

        def text(count: int) -> str:
            return " ".join([*unit, *fresh[:count], *unit])

        # 10 repeated 3-grams among 22 + count: 40 % at count 3
        assert degeneration(text(3))
        assert not degeneration(text(4))

    def test_share_of_letters(self) -> None:
        assert not degeneration("abcdefgh 125790 364851")  # 8 of 20
        assert degeneration("abcdefg 8125790 364851")  # 7 of 20
        assert not degeneration("abcdef 8125790 364851")  # 19 characters
        assert not degeneration(unicodedata.normalize("NFD", "ếềểễệ ốồổỗộ"))  # 10 letters with two marks each

    def test_characters_in_a_row(self) -> None:
        assert not degeneration("hm" + "a" * 23)
        assert degeneration("hm" + "a" * 24)


def test_a_long_answer_of_different_words_is_not_broken() -> None:
    letters = "abcdefghij"
    words = ["".join(letters[int(digit)] for digit in str(number * 7919 % 10007)) for number in range(5000)]
    assert not degeneration(" ".join(words))
    assert degeneration(" ".join(words + words[-30:] * 2))
