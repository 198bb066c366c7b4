"""From log-probabilities and texts to a value and a status: cases worked out by hand, and properties of any reply."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.judges.scoring import Scale, bounds, is_refusal, number, read_text, score

SCALES: tuple[Scale, ...] = ("0-100", "yes-no")
NUMBERS = [str(n) for n in range(101)]
# What stands for no number here, although Python's int() or float() takes most of it.
NO_NUMBERS = [
    *("٥", "８５", "⁸⁵", "८५", "Ⅴ", "½", "➄"),
    *(
        "101",
        "2024",
        "1000",
        "-1",
        "+5",
        "-0",
        "007",
        "05",
        "00",
        "1_0",
        "0x1",
        "1e1",
        "5.0",
        "85.",
        "85%",
        "8 5",
        ".5",
    ),
    *("\u00a085", "\u200985", "\u200b85", "85\ufeff", "\x1c85", "", " ", "\n", "▁85", "Ġ85", "<0x38>", "five", "VIII"),
]


def logs(**probabilities: float) -> list[tuple[str, float]]:
    """Tokens (n85 for 85) with the logs of their probabilities."""
    return [(token.removeprefix("n"), math.log(p)) for token, p in probabilities.items()]


class TestNumber:
    @pytest.mark.parametrize("text", NUMBERS)
    def test_canonical(self, text: str) -> None:
        assert number(text) == number(f" {text}") == number(f"\n\t{text} \r\n") == int(text)

    @pytest.mark.parametrize("text", NO_NUMBERS)
    def test_nothing_else(self, text: str) -> None:
        assert number(text) is None

    @settings(deadline=None)
    @given(st.text())
    def test_any_other_text_is_none(self, text: str) -> None:
        assert (number(text) is None) == (text.strip(" \t\n\r\v\f") not in NUMBERS)


class TestNumbers:
    """score = sum(n p_n) / sum(p_n); each expectation is worked out by hand."""

    def test_weighted_mean(self) -> None:
        assert score(logs(n80=0.3, n20=0.1), "0-100", 0.25) == (pytest.approx((80 * 0.3 + 20 * 0.1) / 0.4), "ok")
        assert score(logs(n0=0.5, n100=0.5), "0-100", 0.25) == (pytest.approx(50), "ok")
        assert score([("50", 0.0)], "0-100", 0.25) == (50.0, "ok")
        assert score([("0", 0.0)], "0-100", 0.25) == (0.0, "ok")

    def test_other_tokens_have_no_say(self) -> None:
        noise = [(token, math.log(0.02)) for token in NO_NUMBERS]
        assert score([*noise, *logs(n85=0.3)], "0-100", 0.25) == (pytest.approx(85), "ok")
        assert score(noise, "0-100", 0.25) == (None, "low_mass")

    def test_same_numbers_add_up(self) -> None:
        given = [("85", math.log(0.1)), (" 85", math.log(0.1)), ("85", math.log(0.1)), ("15", math.log(0.1))]
        value, status = score(given, "0-100", 0.25)
        assert (value, status) == (pytest.approx((85 * 0.3 + 15 * 0.1) / 0.4), "ok")
        assert score(given[:2], "0-100", 0.25) == (None, "low_mass")
        assert score(given[:3], "0-100", 0.25) == (pytest.approx(85), "ok")

    def test_the_threshold_itself_is_enough(self) -> None:
        given = [("50", math.log(0.25))]
        mass = math.exp(given[0][1])
        assert score(given, "0-100", mass) == (50.0, "ok")
        assert score(given, "0-100", math.nextafter(mass, 1)) == (None, "low_mass")

    def test_refusal_says_why_there_is_none_and_takes_no_score_away(self) -> None:
        assert score(logs(REFUSAL=0.8, n50=0.2), "0-100", 0.25) == (None, "refused")
        assert score(logs(REF=0.8, n50=0.2), "0-100", 0.25) == (None, "refused")
        assert score(logs(REFUSAL=0.1, n50=0.2), "0-100", 0.25) == (None, "low_mass")
        assert score(logs(REFUSAL=0.6, n50=0.4), "0-100", 0.25) == (pytest.approx(50), "ok")  # as published

    def test_probabilities_above_one_in_sum(self) -> None:
        assert score([("80", 0.0), ("20", 0.0), ("x", 0.0)], "0-100", 1.0) == (50.0, "ok")

    def test_minus_infinity_is_probability_zero(self) -> None:
        assert score([("80", -0.1), ("20", -math.inf)], "0-100", 0.25) == (pytest.approx(80), "ok")
        assert score([("80", -math.inf)], "0-100", 0.25) == (None, "low_mass")
        assert score([("80", -9999.0), ("REF", -math.inf)], "0-100", 1e-300) == (None, "low_mass")

    def test_never_beyond_the_scale(self) -> None:
        for tenth in range(1, 1000):
            value, _ = score([("100", math.log(tenth / 1000))], "0-100", 1e-9)
            assert value is not None
            assert value <= 100


class TestYesNo:
    def test_share_of_yes(self) -> None:
        assert score(logs(YES=0.3, NO=0.1), "yes-no", 0.25) == (pytest.approx(0.75), "ok")
        assert score([(" YES", math.log(0.1)), ("YES", math.log(0.2)), ("NO\n", math.log(0.1))], "yes-no", 0.25) == (
            pytest.approx(0.75),
            "ok",
        )
        assert score(logs(NO=0.9), "yes-no", 0.25) == (0.0, "ok")

    def test_only_as_asked_for(self) -> None:
        assert score(logs(Yes=0.5, no=0.3, n1=0.1, YESSIR=0.1), "yes-no", 0.25) == (None, "low_mass")

    def test_refusal_wins_where_it_is_the_likeliest_of_the_three(self) -> None:
        assert score(logs(REFUSAL=0.4, YES=0.3, NO=0.3), "yes-no", 0.25) == (None, "refused")
        assert score(logs(REF=0.4, YES=0.3, NO=0.3), "yes-no", 0.25) == (None, "refused")
        assert score(logs(REFUSAL=0.3, YES=0.6, NO=0.1), "yes-no", 0.25) == (pytest.approx(6 / 7), "ok")
        assert score([("REFUSAL", -1.0), ("YES", -1.0)], "yes-no", 0.25) == (1.0, "ok")  # not more likely

    def test_low_mass(self) -> None:
        assert score(logs(YES=0.1, NO=0.1), "yes-no", 0.25) == (None, "low_mass")
        assert score(logs(YES=0.1, NO=0.16), "yes-no", 0.25)[1] == "ok"

    @pytest.mark.parametrize("token", ["REFUSAL", " REFUSAL\n", "REF", "REFUS"])
    def test_refusal_tokens(self, token: str) -> None:
        assert is_refusal(token)

    @pytest.mark.parametrize("token", ["", "R", "RE", "refusal", "Ref", "REFUSALS", "REFUSED", "FUSAL", "RÉF"])
    def test_no_refusal_tokens(self, token: str) -> None:
        assert not is_refusal(token)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "given",
    [None, [], [("85", math.nan)], [("YES", -0.1), ("85", -0.1), ("x", math.nan)], [("85", 3.0)], [("x", math.inf)]],
)
def test_what_is_no_list_of_log_probabilities_is_unparsable(
    given: list[tuple[str, float]] | None, scale: Scale
) -> None:
    assert score(given, scale, 0.25) == (None, "unparsable")


TOKENS = st.one_of(
    st.sampled_from([*NUMBERS, *NO_NUMBERS, *(f" {n}" for n in range(101)), "YES", "NO", "REFUSAL", "REF", "Yes"]),
    st.text(max_size=4),
)
LOGS = st.one_of(st.floats(max_value=0.0), st.sampled_from([-math.inf, 0.0, -0.0, 1e-3, -9999.0]))
REPLIES = st.lists(st.tuples(TOKENS, LOGS), min_size=1, max_size=20)
MASSES = st.floats(min_value=1e-300, max_value=1.0)


class TestProperties:
    @settings(deadline=None)
    @given(REPLIES, st.sampled_from(SCALES), MASSES)
    def test_a_value_on_the_scale_exactly_if_ok(
        self, given: Sequence[tuple[str, float]], scale: Scale, mass: float
    ) -> None:
        value, status = score(given, scale, mass)
        assert status in ("ok", "low_mass", "refused")
        assert (value is not None) == (status == "ok")
        if value is not None:
            low, high = bounds(scale)
            assert low <= value <= high

    @settings(deadline=None)
    @given(st.lists(st.tuples(TOKENS, st.floats()), max_size=20), st.sampled_from(SCALES), MASSES)
    def test_no_reply_raises(self, given: Sequence[tuple[str, float]], scale: Scale, mass: float) -> None:
        value, status = score(given, scale, mass)
        assert (value is not None) == (status == "ok")

    @settings(deadline=None)
    @given(REPLIES, st.sampled_from(SCALES), MASSES)
    def test_order_does_not_matter(self, given: Sequence[tuple[str, float]], scale: Scale, mass: float) -> None:
        assert score(given, scale, mass) == score(list(reversed(given)), scale, mass)

    @settings(deadline=None)
    @given(REPLIES, MASSES)
    def test_a_plain_reading_of_the_published_rule(self, given: Sequence[tuple[str, float]], mass: float) -> None:
        total = weighted = 0.0
        for token, log in given:
            if (text := token.strip(" \t\n\r\v\f")) in NUMBERS:
                total += math.exp(log)
                weighted += int(text) * math.exp(log)
        value, _ = score(given, "0-100", mass)
        if abs(total - mass) > 1e-12 * mass:  # at the threshold the order of a plain sum decides
            assert (value is None) == (total < mass)
        if value is not None:
            assert value == pytest.approx(weighted / total, rel=1e-12)

    @settings(deadline=None)
    @given(REPLIES, st.sampled_from(SCALES), MASSES, MASSES)
    def test_a_higher_threshold_never_makes_a_score(
        self, given: Sequence[tuple[str, float]], scale: Scale, one: float, other: float
    ) -> None:
        strict, lax = score(given, scale, max(one, other))[0], score(given, scale, min(one, other))[0]
        assert strict is None or strict == lax


class TestText:
    @pytest.mark.parametrize("text", ["85", " 85", "85\n"])
    def test_a_number_alone(self, text: str) -> None:
        assert read_text(text, "0-100") == (85.0, "ok")

    @pytest.mark.parametrize("text", [None, "85/100", "Score: 85", "85 85", "YES", *NO_NUMBERS])
    def test_anything_else(self, text: str | None) -> None:
        assert read_text(text, "0-100") == (None, "unparsable")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("YES", (1.0, "ok")),
            (" NO\n", (0.0, "ok")),
            ("Yes", (None, "unparsable")),
            ("YES.", (None, "unparsable")),
            ("1", (None, "unparsable")),
            ("REFUSAL", (None, "refused")),
            ("REF", (None, "unparsable")),
        ],
    )
    def test_yes_no(self, text: str, expected: tuple[float | None, str]) -> None:
        assert read_text(text, "yes-no") == expected

    def test_refusal(self) -> None:
        assert read_text(" REFUSAL ", "0-100") == (None, "refused")

    @settings(deadline=None)
    @given(st.text(), st.sampled_from(SCALES))
    def test_a_value_exactly_if_ok(self, text: str, scale: Scale) -> None:
        value, status = read_text(text, scale)
        assert (value is not None) == (status == "ok")
