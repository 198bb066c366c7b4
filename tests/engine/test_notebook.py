"""Sweeps in a notebook: one updated output, tables to read, messages in place of tracebacks, an interrupt that leaves
the kernel usable. The slow tests run a real kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from rich.console import Console
from traitlets.config import Config

from engine.notebook import NUM_ENDED, UPDATE_INTERVAL_S, NotebookProgress
from engine.progress import make_progress
from engine.software import PACKAGES, ROOT
from tests.engine.tiny_sweep import RUNS, write_tiny_sweep
from trainables.errors import ConfigError, DataError, Fault, Interrupted, ShiftgradError

DIVERGING = """\
  - label: diverging <b>
    defense: none
    training: {learning_rate: 1.0e+30, max_gradient_norm: null, max_steps: 4}
"""


class _Clock:
    """Seconds since some beginning, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class _Cell:
    """The outputs of a cell, as a front end shows them."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.num_updates = 0

    def show(self, content: dict[str, str]) -> _Cell:
        self.outputs.append(content)
        return self

    def update(self, obj: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.num_updates += 1
        self.outputs[-1] = obj

    @property
    def text(self) -> str:
        return self.outputs[-1]["text/plain"]

    @property
    def page(self) -> str:
        return self.outputs[-1]["text/html"]


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> _Clock:
        clock = _Clock()
        monkeypatch.setattr("engine.progress.time", clock)
        monkeypatch.setattr("engine.notebook.time", clock)
        return clock

    @pytest.fixture
    def cell(self) -> _Cell:
        return _Cell()

    @pytest.fixture
    def view(self, clock: _Clock, cell: _Cell) -> NotebookProgress:
        del clock
        view = NotebookProgress(cell.show)
        view.start(3)
        return view

    def test_is_chosen_in_a_notebook(self) -> None:
        assert isinstance(make_progress(Console(force_jupyter=True)), NotebookProgress)

    def test_is_one_output_from_start_to_end(self, view: NotebookProgress, cell: _Cell, clock: _Clock) -> None:
        assert cell.text == "0 of 3 jobs ended (0s)"
        view.job_started("a", "none")
        assert cell.text.splitlines()[1].strip() == "none: starting"
        view.job_figures("a", "none", {"phase": "train", "units_done": 0, "units_total": 18})
        clock.now += 30
        view.job_figures("a", "none", {"phase": "train", "units_done": 6, "units_total": 18, "loss": 2.34567})
        assert cell.text.splitlines() == ["0 of 3 jobs ended (30s)", "none: train 6/18 loss 2.346, 1m00s left"]
        assert "<progress style='width: 8em' value='6' max='18'>" in cell.page
        clock.now += 60
        view.job_ended("a", "none", "done in 90 s")
        view.job_started("b", "pps")
        view.job_ended("b", "pps", "FAILED: the loss is nan", ok=False)
        view.job_ended("c", "child", "skipped: needs pps, which failed", ok=False)
        view.stop()
        assert cell.text.splitlines() == [
            "3 of 3 jobs ended, 2 of them failed or skipped (1m30s)",
            "[  1m30s] pps: FAILED: the loss is nan",
            "[  1m30s] child: skipped: needs pps, which failed",
            "[  1m30s] none: done in 90 s",
        ]
        assert "value='3' max='3'" in cell.page
        assert len(cell.outputs) == 1

    def test_is_updated_no_faster_than_a_person_can_read(
        self, view: NotebookProgress, cell: _Cell, clock: _Clock
    ) -> None:
        view.job_started("a", "none")
        before = cell.num_updates
        for step in range(1000):
            clock.now += 0.01
            view.job_figures("a", "none", {"phase": "train", "units_done": step, "units_total": 1000})
        assert cell.num_updates - before <= 10 / UPDATE_INTERVAL_S
        view.job_ended("a", "none", "done")
        assert "none: done" in cell.text, "an end is shown at once"

    def test_of_many_jobs_stays_short_but_keeps_every_failure(self, view: NotebookProgress, cell: _Cell) -> None:
        for number in range(50):
            view.job_started(str(number), f"job {number}")
            view.job_ended(str(number), f"job {number}", "FAILED: x" if number < 3 else "done", ok=number >= 3)
        lines = cell.text.splitlines()
        assert sum("FAILED" in line for line in lines) == 3
        assert f"{47 - NUM_ENDED} earlier ones: done" in lines
        assert len(lines) == 1 + 3 + 1 + NUM_ENDED

    def test_says_what_was_running_when_it_was_stopped(self, view: NotebookProgress, cell: _Cell) -> None:
        view.job_started("a", "none")
        view.stop()
        assert cell.text.startswith("0 of 3 jobs ended (0s); stopped while 1 ran\nnone: starting")

    def test_shows_any_text_as_it_is(self, view: NotebookProgress, cell: _Cell) -> None:
        text = "<script>x</script> & [bold]"
        view.job_started("a", text)
        view.job_figures("a", text, {"phase": "train", "units_done": 1, "units_total": 2})
        escaped = "&lt;script&gt;x&lt;/script&gt; &amp; [bold]"
        assert f"{escaped}: starting" in cell.page
        view.job_ended("a", text, f"FAILED: {text}", ok=False)
        assert f"{escaped}: FAILED: {escaped}" in cell.page
        assert "<script>" not in cell.page

    def test_what_it_has_not_heard_of_does_no_harm(self, view: NotebookProgress, cell: _Cell) -> None:
        view.job_figures("z", "unknown", {"phase": "train", "units_done": 1, "units_total": 2})
        view.job_figures("z", "unknown", {"sampled": "abc"})
        assert "unknown" not in cell.text
        NotebookProgress(cell.show).stop()


class TestErrors:
    @pytest.fixture
    def shell(self, tmp_path: Path) -> Iterator[InteractiveShell]:
        config = Config({"HistoryManager": {"enabled": False}, "InteractiveShell": {"colors": "nocolor"}})
        yield InteractiveShell.instance(config=config, ipython_dir=str(tmp_path))
        InteractiveShell.clear_instance()

    @pytest.mark.parametrize(
        ("error", "shown"),
        [
            (
                ConfigError([Fault("runs[0].seed", "must be a number"), Fault("name", "is missing")]),
                "ConfigError: 2 faults found; nothing was started:\n"
                "  - runs[0].seed: must be a number\n  - name: is missing\n",
            ),
            (DataError("row 3 has no answer"), "DataError: row 3 has no answer\n"),
            (Interrupted("stopped. Run it again."), "Interrupted: stopped. Run it again.\n"),
        ],
    )
    def test_are_their_message_alone(
        self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str], error: BaseException, shown: str
    ) -> None:
        shell.push({"error": error})
        ended = shell.run_cell("def inside(): raise error\ninside()")
        assert ended.error_in_exec is error
        assert capsys.readouterr().out == shown

    def test_of_other_kinds_keep_their_traceback(
        self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shell.run_cell("1 / 0")
        assert "Traceback" in capsys.readouterr().out

    def test_an_interrupt_is_one_for_python_too(self) -> None:
        assert issubclass(Interrupted, KeyboardInterrupt)
        assert not issubclass(Interrupted, ShiftgradError), "`except Exception` must not catch it"


def test_nothing_of_ours_starts_an_event_loop() -> None:
    """The kernel's main thread has one, in which ``asyncio.run`` raises."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 50
    calls = re.compile(r"asyncio\.(run|Runner|new_event_loop)\(|run_until_complete|nest_asyncio")
    found = [path.name for path in files if calls.search(path.read_text(encoding="utf-8"))]
    assert found == ["rescore.py"]  # in a thread of its own


def _cells(*sources: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def _outputs(cell: Any, kind: str) -> list[Any]:
    return [output for output in cell.outputs if output.output_type == kind]


@pytest.mark.slow
def test_a_sweep_in_a_real_notebook(tmp_path: Path) -> None:
    path = str(write_tiny_sweep(tmp_path / "a sweep", runs=RUNS + DIVERGING, extra="execution: {trials: 2}"))
    notebook = _cells(
        f"from engine import Sweep\nsweep = Sweep.from_yaml({path!r})\nsweep",
        "print('before')\nresults = sweep.run()",
        "results",
        "results.summary()",
        f"Sweep.from_yaml({path!r}, 'runs.1.defense.layer=77').run()",
        "results.run('none')",
        "model, tokenizer = results.load_model('none')\n"
        "len(model.generate(**tokenizer('Tea', return_tensors='pt'), max_new_tokens=3)[0])",
        "import asyncio, ray\nawait asyncio.sleep(0)\nray.is_initialized()",
    )
    client = NotebookClient(
        notebook, timeout=600, allow_errors=True, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    opened, ran, shown, summary, faulty, run, loaded, after = notebook.cells

    (output,) = opened.outputs
    assert output.data["text/plain"].startswith("<Sweep 'tiny' of ")
    (progress,) = _outputs(ran, "display_data")
    assert progress.data["text/plain"].startswith("8 of 8 jobs ended, 1 of them failed or skipped (")
    assert "diverging &lt;b&gt;: FAILED: TrainingError: run " in progress.data["text/html"]
    assert [output.text for output in _outputs(ran, "stream")] == ["before\n"], "and nothing else is printed"
    (output,) = shown.outputs
    assert "tiny: 1 base and 5 runs: 5 done, 1 failed" in output.data["text/html"]
    assert "<table" in output.data["text/html"]
    (output,) = summary.outputs
    assert "plain_loss" in output.data["text/html"]
    (output,) = faulty.outputs
    assert (output.ename, output.traceback) == ("ConfigError", [f"ConfigError: {output.evalue}"])
    assert output.evalue.startswith("1 fault found; nothing was started:\n  - runs[1].defense.layer: layer 77")
    assert "first answers" in run.outputs[0].data["text/html"]
    assert int(loaded.outputs[-1].data["text/plain"]) > 1
    assert after.outputs[-1].data["text/plain"] == "False", "Ray is down, and the kernel's event loop turns"


class _Kernel:
    """A kernel with what its cells have printed and shown."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager = manager
        self.client = client

    def run(self, code: str, interrupt_at: str | None = None) -> tuple[str, str]:
        """``ok`` or ``error``, and all text of the cell; interrupted when that text has ``interrupt_at``."""
        texts: list[str] = []
        interrupted = False

        def note(message: dict[str, Any]) -> None:
            nonlocal interrupted
            content = message["content"]
            texts.append(content.get("text") or content.get("data", {}).get("text/plain", ""))
            if interrupt_at is not None and not interrupted and interrupt_at in texts[-1]:
                interrupted = True
                self.manager.interrupt_kernel()
            texts.extend(content.get("traceback", []))

        reply = self.client.execute_interactive(code, output_hook=note, timeout=500)
        assert interrupted == (interrupt_at is not None)
        return reply["content"]["status"], "\n".join(texts)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[_Kernel]:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    yield _Kernel(manager, client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_a_kernel_in_which_it_goes_on(kernel: _Kernel, tmp_path: Path) -> None:
    runs = "  - {defense: none, training: {max_steps: 3000}}\n"
    path = str(write_tiny_sweep(tmp_path / "sweep", runs=runs, extra="execution: {trials: 2}"))
    assert kernel.run(f"from engine import Sweep\nsweep = Sweep.from_yaml({path!r})")[0] == "ok"
    status, text = kernel.run("results = sweep.run()", interrupt_at="none: train ")
    assert status == "error"
    assert text.rstrip().endswith("Interrupted: stopped. What is finished is kept; run the same again to go on.")
    assert "Traceback" not in text
    assert "stopped while 1 ran" in text
    children = "import psutil\n[child.name() for child in psutil.Process().children(recursive=True)]"
    deadline = time.monotonic() + 60  # Ray's processes end by themselves, but not at one instant
    while (left := kernel.run(children)[1].strip()) != "[]" and time.monotonic() < deadline:
        time.sleep(1)
    assert left == "[]", "no process of Ray is left"
    status, text = kernel.run("print(Sweep.from_yaml(sweep.path, 'runs.0.training.max_steps=2').run())")
    assert status == "ok", text
    assert "<Results tiny: 1 base and 1 run: 2 done; " in text
