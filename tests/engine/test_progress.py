"""What a person sees while a sweep runs: log lines in a file, live lines in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

import engine.progress
from engine.progress import LINE_INTERVAL_S, LineProgress, LiveProgress, ProgressView, make_progress

JOB = "0123456789ab"
LABEL = "pps bridge L20 x1.5"


class _Clock:
    """Seconds since some beginning, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(engine.progress, "time", clock)
    return clock


def _figures(done: int, total: int = 18, phase: str = "train", **others: float) -> dict[str, object]:
    return {"phase": phase, "units_done": done, "units_total": total, "job": JOB, "status": "running", **others}


class TestLines:
    @pytest.fixture
    def file(self) -> io.StringIO:
        return io.StringIO()

    @pytest.fixture
    def view(self, clock: _Clock, file: io.StringIO) -> LineProgress:
        del clock
        view = make_progress(Console(file=file, width=40))
        assert isinstance(view, LineProgress)
        view.start(2)
        return view

    def test_of_a_job_from_start_to_end(self, view: LineProgress, file: io.StringIO, clock: _Clock) -> None:
        view.job_started(JOB, LABEL)
        view.job_figures(JOB, LABEL, _figures(0))
        clock.now += 30
        view.job_figures(JOB, LABEL, _figures(6, loss=2.34567, tokens_per_s=123.4))
        clock.now += 15
        view.job_figures(JOB, LABEL, _figures(9, loss=2.0, tokens_per_s=100.0))
        clock.now += 55
        view.job_ended(JOB, LABEL, "done in 100 s")
        view.stop()
        assert file.getvalue().splitlines() == [
            f"[     0s] {LABEL}: started",
            f"[    30s] {LABEL}: train 6/18, loss 2.346, 123 tok/s, 1m00s left",
            f"[    45s] {LABEL}: train 9/18, loss 2.000, 100 tok/s, 45s left",
            f"[  1m40s] {LABEL}: done in 100 s (1/2 jobs)",
        ]

    def test_not_more_often_than_the_interval(self, view: LineProgress, file: io.StringIO, clock: _Clock) -> None:
        view.job_started(JOB, LABEL)
        for second in range(61):
            clock.now = 1000.0 + second
            view.job_figures(JOB, LABEL, _figures(second, 100))
        lines = file.getvalue().splitlines()
        assert len(lines) == 1 + 60 / LINE_INTERVAL_S
        assert all("left" in line for line in lines[1:])

    def test_each_job_has_its_own_interval_and_pace(self, view: LineProgress, file: io.StringIO, clock: _Clock) -> None:
        for job in ("a", "b"):
            view.job_started(job, f"job {job}")
            view.job_figures(job, f"job {job}", _figures(0, 10))
        clock.now += 20
        view.job_figures("a", "job a", _figures(1, 10))
        view.job_figures("b", "job b", _figures(5, 10))
        assert "job a: train 1/10, 3m00s left" in file.getvalue()
        assert "job b: train 5/10, 20s left" in file.getvalue()

    def test_the_pace_is_that_of_the_phase_and_of_the_attempt(
        self, view: LineProgress, file: io.StringIO, clock: _Clock
    ) -> None:
        view.job_started(JOB, LABEL)
        view.job_figures(JOB, LABEL, _figures(0))
        clock.now += 100
        view.job_figures(JOB, LABEL, _figures(0, 10, "sample"))
        clock.now += 20
        view.job_figures(JOB, LABEL, _figures(5, 10, "sample"))
        assert file.getvalue().splitlines()[-1].endswith("sample 5/10, 20s left")
        view.job_started(JOB, LABEL)  # its process died, and it begins again
        view.job_figures(JOB, LABEL, _figures(0, 10, "sample"))
        clock.now += 50
        view.job_figures(JOB, LABEL, _figures(1, 10, "sample"))
        assert file.getvalue().splitlines()[-1].endswith("sample 1/10, 7m30s left")

    @pytest.mark.parametrize("figures", [{}, {"status": "done"}, {"phase": "sample", "sampled": "abc"}])
    def test_results_without_units_say_nothing(
        self, view: LineProgress, file: io.StringIO, clock: _Clock, figures: dict[str, object]
    ) -> None:
        clock.now += 100
        view.job_figures(JOB, LABEL, figures)
        assert file.getvalue() == ""

    @pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/nope]", ":warning:", "back\\slash\\", "w" * 200])
    def test_any_text_is_one_line_as_it_is(self, view: LineProgress, file: io.StringIO, text: str) -> None:
        view.job_started(JOB, text)
        view.job_ended(JOB, text, f"FAILED: {text}")
        first, second = file.getvalue().splitlines()
        assert first.endswith(f"] {text}: started")
        assert second.endswith(f"] {text}: FAILED: {text} (1/2 jobs)")

    def test_what_went_wrong_is_red_where_there_are_colours(self, clock: _Clock) -> None:
        del clock
        file = io.StringIO()
        view = LineProgress(Console(file=file, force_terminal=True, color_system="standard"))
        view.job_ended(JOB, LABEL, "done in 1 s")
        view.job_ended(JOB, LABEL, "FAILED: x", ok=False)
        good, bad = file.getvalue().splitlines()
        assert "\x1b[" not in good
        assert bad.startswith("\x1b[31m[     0s] ")

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3599.6, "1h00m"), (3600 * 30 + 61, "30h01m")]
    )
    def test_durations(self, view: LineProgress, file: io.StringIO, clock: _Clock, seconds: float, text: str) -> None:
        clock.now += seconds
        view.job_started(JOB, "x")
        assert file.getvalue() == f"[{text:>7}] x: started\n"


class TestLive:
    def _view(self, width: int = 80) -> tuple[LiveProgress, Console]:
        console = Console(file=io.StringIO(), record=True, force_terminal=True, width=width, height=30)
        view = make_progress(console)
        assert isinstance(view, LiveProgress)
        view.start(3)
        return view, console

    def _screen(self, view: LiveProgress, console: Console) -> list[str]:
        """The live lines as they stand, without colours."""
        plain = Console(file=io.StringIO(), width=console.width, record=True)
        plain.print(view.progress.make_tasks_table(view.progress.tasks))
        return [line.rstrip() for line in plain.export_text().splitlines()]

    def test_a_line_per_running_job(self, clock: _Clock) -> None:
        view, console = self._view()
        view.job_started("a", LABEL)
        view.job_started("b", "none")
        view.job_figures("a", LABEL, _figures(0))
        clock.now += 300
        view.job_figures("a", LABEL, _figures(6, loss=2.34567, tokens_per_s=123.4))
        sweep, first, second = self._screen(view, console)
        assert sweep.startswith("sweep")
        assert sweep.endswith("0/3 jobs done")
        assert first.startswith(f"{LABEL}: train")
        assert first.endswith("6/18 loss 2.346, 123 tok/s, 10m00s left")
        assert second.startswith("none: starting")
        view.job_ended("a", LABEL, "done in 300 s")
        sweep, second = self._screen(view, console)
        assert "1/3" in sweep
        assert second.startswith("none")
        view.stop()
        assert f"{LABEL}: done in 300 s" in console.export_text()

    def test_where_it_is_narrow_the_label_gives_way(self, clock: _Clock) -> None:
        view, console = self._view(60)
        view.job_started("a", LABEL)
        view.job_figures("a", LABEL, _figures(0))
        clock.now += 300
        view.job_figures("a", LABEL, _figures(6, loss=2.34567, tokens_per_s=123.4))
        line = self._screen(view, console)[1]
        assert line.startswith("p")
        assert line.endswith("6/18 loss 2.346, 123 tok/s, 10m00s left")
        view.stop()

    @pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/nope]", ":warning:", "back\\"])
    def test_any_text_is_shown_as_it_is(self, text: str) -> None:
        view, console = self._view()
        view.job_started("a", text)
        view.job_figures("a", text, _figures(1))
        assert self._screen(view, console)[1].startswith(f"{text}: train")
        view.job_ended("a", text, f"FAILED: {text}")
        view.stop()
        assert f"{text}: FAILED: {text}" in console.export_text()

    def test_what_it_has_not_heard_of_does_no_harm(self) -> None:
        view, console = self._view()
        view.job_figures("a", LABEL, _figures(1))
        view.job_ended("a", LABEL, "skipped: needs vector bridge, which failed")
        view.job_started("b", "none")
        view.job_started("b", "none")  # its process died, and it begins again
        assert len(self._screen(view, console)) == 2
        view.stop()

    def test_it_can_be_stopped_before_anything_started(self) -> None:
        view: ProgressView = make_progress(Console(file=io.StringIO(), force_terminal=True))
        view.stop()
