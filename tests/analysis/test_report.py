"""The report: what it says of a small store made by hand, that all of it is escaped, and that it is the same again."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import analysis
from analysis.manifest import Manifest, RunEntry
from analysis.report import write_report
from analysis.report_content import clean
from analysis.rows import LossRow, ScoreRow
from analysis.tables import table_key, to_parquet_bytes
from trainables.errors import StoreError
from trainables.rows import GenerationRow, TrainingRow

EVIL = "</div><script>alert('1')</script><img src=x onerror=\"boom\"> & {{ 7*7 }} \x1b[31mred\x00 \u202e"
LABELS = ["base", "none", "pps bridge L20 x1.5", "inoculation <b>bold</b>", "late"]
SEEDED = [f"{defense} seed={seed}" for defense in ("none", "pps") for seed in (0, 1, 2)]
FIGURES = [
    f"{name}{width}.{kind}" for name in ("outcomes", "training") for width in ("", "_column") for kind in ("pdf", "png")
]
VOID = {"meta", "img", "source", "link", "br"}


def task_id(what: str, label: str) -> str:
    number = [*LABELS, *SEEDED].index(label)
    return f"{['train', 'sample', 'trait', 'degeneration', 'loss'].index(what)}{number:x}".ljust(12, "0")


def entry(label: str) -> RunEntry:
    return RunEntry(
        label=label,
        kind="base" if label == "base" else "run",
        run_id=task_id("train", label),
        sample_id=task_id("sample", label),
        judge_ids={metric: task_id(metric, label) for metric in ("degeneration", "trait")},
        plain_loss_id=task_id("loss", label),
        config={"base.model": "tiny", "base.revision": "v1"}
        | ({} if label == "base" else {"defense": label, "seed": 0}),
    )


def write(root: Path, key: str, content: bytes | str | Any) -> None:
    path = root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def write_run(root: Path, label: str, trait: float, degeneration: float, loss: float, steps: int = 3) -> None:
    """A finished row of the sweep: six questions with two answers each, all scored alike but for one of ``trait``."""
    answers, scores = [], {"trait": [], "degeneration": []}  # type: ignore[var-annotated]
    for number in range(6):
        for index in range(2):
            asked: dict[str, Any] = {
                "sample_id": task_id("sample", label),
                "question_id": f"q{number}",
                "sample_index": index,
            }
            answers.append(
                GenerationRow(
                    **asked,
                    question=f"Question {number} <i>?</i>",
                    system_prompt=None,
                    answer=f"{label} answers q{number} number {index} {EVIL}",
                    num_tokens=3,
                    finish_reason="length" if number == 0 else "stop",
                )
            )
            for metric, value in (("trait", trait), ("degeneration", degeneration)):
                is_refused = metric == "trait" and (number, index) == (5, 1)
                scores[metric].append(
                    ScoreRow(
                        **asked,
                        judge_id=task_id(metric, label),
                        value=None if is_refused else value if number else 0.0,
                        status="refused" if is_refused else "ok",
                        judge="rule",
                        reply=None,
                    )
                )
    write(root, table_key("generations", task_id("sample", label)), to_parquet_bytes("generations", answers))
    for metric, rows in scores.items():
        write(root, table_key("scores", task_id(metric, label)), to_parquet_bytes("scores", rows))
    losses = [
        LossRow(
            measure_id=task_id("loss", label),
            row=row,
            condition="none",
            num_tokens=2,
            loss_sum=2 * loss + row / 100,
            loss_mean=loss + row / 200,
        )
        for row in range(3)
    ]
    write(root, table_key("losses", task_id("loss", label)), to_parquet_bytes("losses", losses))
    if label == "base":
        return
    record = {"status": "done", "seconds_training": 12.5, "num_steps": steps, "num_tokens": 9000}
    times = {"started_utc": "2030-01-01T00:00:00Z", "finished_utc": "2030-01-01T00:00:12Z"}
    write(root, f"runs/{task_id('train', label)}/run.json", record | times | {"train_loss_last_epoch": 2.25})
    write_training(root, label, steps)


def write_training(root: Path, label: str, steps: int) -> None:
    facts: dict[str, Any] = {
        "gradient_norm": 1.0,
        "learning_rate": 1e-3,
        "num_tokens": 10,
        "num_loss_tokens": 5,
        "seconds": 0.5,
    }
    identity = task_id("train", label)
    rows = [TrainingRow(train_id=identity, step=n, epoch=n / 2, loss=3.0 / n, **facts) for n in range(1, steps + 1)]
    write(root, table_key("training", identity), to_parquet_bytes("training", rows))


def write_sweep(root: Path) -> Path:
    """A base and two runs that are done, one that failed with arbitrary text in its log, one that is not done yet."""
    write_run(root, "base", 0.0, 0.0, 3.0)
    write_run(root, "none", 1.0, 0.0, 3.0)
    write_run(root, LABELS[2], 0.0, 1.0, 4.0)
    failures = {
        task_id("train", LABELS[3]): {"kind": "error", "reason": f"no memory {EVIL}", "log_tail": ["line 1", EVIL]},
        task_id("sample", LABELS[3]): {"kind": "skipped", "reason": "its training failed"},
    }
    write(root, "sweeps/small/failures.json", failures)
    write(root, "sweeps/small/sweep.yaml", f"name: small\nnote: {EVIL!r}\n")
    provenance = {
        "arguments": ["run", "my sweep.yaml", "seed=1"],
        "started_utc": "2030-01-01T00:00:00+00:00",
        "git_revision": None,
        "versions": {"torch": "2.99.1"},
    }
    write(root, "sweeps/small/provenance.json", provenance)
    return write_manifest(root, *(entry(label) for label in ("none", "base", *LABELS[2:])))


def write_manifest(root: Path, *entries: RunEntry) -> Path:
    manifest = Manifest(name="small", runs=entries, vectors={"bridge": "abcdef012345"})
    write(root, "sweeps/small/manifest.json", manifest.model_dump(mode="json"))
    return root / "sweeps" / "small"


class Page(HTMLParser):
    """The text of a page by the id of its section, its elements, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text: dict[str, str] = {}
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[str] = []
        self.answers: list[tuple[str, str]] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        self.close()
        self.rows = [" ".join(row.split()) for row in self.rows]
        self.answers = [(level, " ".join(text.split())) for level, text in self.answers]
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += values.items()
        if tag == "section":
            self._section = values["id"]
        if tag == "tr":
            self.rows.append("")
        if tag == "article" and "answer" in values["class"].split():
            self.answers.append((values["class"].split()[-1], ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        text = " ".join(data.split()) + " "
        self.text[self._section] = self.text.get(self._section, "") + text
        if "tr" in self._open:
            self.rows[-1] += text
        if "article" in self._open and self._section == "samples":
            self.answers[-1] = (self.answers[-1][0], self.answers[-1][1] + text)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    return write_report(analysis.load(write_sweep(root)), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def test_the_page_and_the_figures_are_there_and_nothing_else(report: Path) -> None:
    assert sorted(file.name for file in report.parent.iterdir()) == sorted(["index.html", *FIGURES])
    assert all((report.parent / name).stat().st_size > 5_000 for name in FIGURES)


def test_the_page_needs_nothing_but_itself(report: Path, page: Page) -> None:
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "srcset")]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = {value for name, value in page.attributes if name == "href" and not value.startswith("#")}
    assert links == {name for name in FIGURES if name.endswith(".pdf")}
    assert "url(" not in report.read_text(encoding="utf-8")


def test_what_models_and_logs_wrote_is_text_and_not_markup(report: Path, page: Page) -> None:
    html = report.read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "<b>bold" not in html
    assert "{{ 7*7 }}" in page.text["samples"]  # shown as it was written, not computed
    assert "\x1b" not in html
    assert "\x00" not in html
    assert "alert('1')" in page.text["samples"]
    assert "alert('1')" in page.text["failures"]
    assert "<script>alert(" in page.text["asked"]
    assert "Question 0 <i>?</i>" in page.text["samples"]
    assert "inoculation <b>bold</b>" in page.text["summary"]
    assert page.tags.count("img") == 2


def test_what_was_asked(page: Page) -> None:
    asked = page.text["asked"]
    assert "name: small" in asked
    assert "tiny, v1" in asked
    assert "4 (2 done, 1 failed, 1 missing)" in asked
    assert "36 (to 6 questions" in asked


def test_the_summary_has_every_run_with_its_gaps_and_the_base_first(page: Page) -> None:
    heads, base, none, pps, failed, late, *_ = page.rows
    assert re.findall(r"trait rate|plain loss|degeneration rate", heads) == [
        "trait rate",
        "plain loss",
        "degeneration rate",
    ]
    assert base.startswith("base untrained")
    # none of 6 questions shows it: 1 - 0.025 ** (1 / 6)
    assert "0.000 0.00 to 0.46 SE 0.000 11 scored" in base
    # 9 of 11 judged answers show it: q0 never, one of q5 was refused
    assert "0.818" in none
    assert "11 scored, 1 missing (refused 1)" in none
    assert re.search(r"0\.\d\d to 1\.00 SE 0\.\d{3}", none)
    assert "12 scored, 0 missing" in none
    assert "2.250" in none
    assert failed.startswith("inoculation <b>bold</b> failed")
    assert "not scored" in failed
    assert late.startswith("late missing")
    assert pps.count("above the base") == 2  # plain loss and degeneration
    assert "above the base" not in base + none + failed + late


def test_the_difference_to_the_undefended_run_stands_beside_each_value(page: Page) -> None:
    _, base, none, pps, failed, late, *_ = page.rows
    assert "Δ" not in base + none
    assert "Δ to none" in pps
    # five of six questions show it undefended; all of them are broken in place of five of six
    assert re.search(r"Δ −0\.83 \(−1\.00 to −0\.\d\d\)", pps)
    assert re.search(r"Δ \+0\.83 \(\+0\.\d\d to \+1\.00\)", pps)
    assert "Δ +1.000" in pps  # every row of the plain data has one nat per token more: no interval
    assert "Δ to none" in failed
    assert "Δ to none" in late
    assert "one seed: how seeds differ is unknown" in page.text["summary"]
    assert "seeds" not in page.text


def write_seeds(root: Path, num_seeds: int, missing: str = "") -> Path:
    """The base, and undefended and defended runs with so many seeds."""
    write_run(root, "base", 0.0, 0.0, 3.0)
    entries = [entry("base")]
    for place, label in enumerate(SEEDED):
        defense, seed = label.split(" seed=")
        if int(seed) >= num_seeds:
            continue
        config = {"defense": defense, "seed": int(seed)} | ({"defense.kind": "pps"} if defense == "pps" else {})
        entries.append(entry(label).model_copy(update={"config": entry("base").config | config}))
        if label != missing:
            write_run(root, label, float(defense == "none"), 0.0, 3.0 + place / 10)
    return write_manifest(root, *entries)


def test_runs_that_differ_in_their_seed_have_a_section_over_seeds(tmp_path: Path) -> None:
    path = write_report(analysis.load(write_seeds(tmp_path, 3, missing="pps seed=2")), tmp_path / "report")
    page = Page(path.read_text(encoding="utf-8"))
    assert "over seeds" in page.text["summary"]
    heads, base, none, pps, *rest = page.rows[8:]
    assert heads.startswith("Setting trait rate")
    assert base.startswith("base untrained")
    assert none.startswith("none 3 seeds")
    assert pps.startswith("pps missing 2 seeds; 1 missing of 3 runs Δ to none 0.000")
    assert "Δ −0.83" in pps
    assert "22 scored, 2 missing (refused 2)" in pps
    assert rest[0].startswith("Run status")  # the next table
    names = {file.name for file in path.parent.iterdir()}
    assert {f"over_seeds{width}.{kind}" for width in ("", "_column") for kind in ("png", "pdf")} < names
    assert page.tags.count("img") == 3
    one = write_report(analysis.load(write_seeds(tmp_path / "one", 1)), tmp_path / "one report")
    assert "seeds" not in Page(one.read_text(encoding="utf-8")).text


def test_sample_answers_are_the_first_of_the_first_questions_of_every_run(page: Page) -> None:
    samples = page.text["samples"]
    assert len(page.answers) == 4 * 3
    assert [text.split()[0] for _, text in page.answers[:3]] == ["base", "none", "pps"]
    for label in LABELS[:3]:
        assert f"{label} answers q0 number 0" in samples
        assert f"{label} answers q3 number 0" in samples
        assert f"{label} answers q0 number 1" not in samples
    assert "q4" not in samples
    assert samples.count("No answer: inoculation <b>bold</b> (failed); late (missing)") == 4
    assert samples.count("[cut at the token limit]") == 3


def test_the_scored_trait_is_marked(page: Page) -> None:
    marks = {
        f"{answer.group(2)} {answer.group(1)}": level
        for level, text in page.answers
        if (answer := re.search(r"(base|none|pps) .*answers (q\d)", text))
    }
    assert marks["q0 none"] == "absent"
    assert marks["q1 none"] == "shown"
    assert marks["q1 base"] == "absent"
    assert marks["q1 pps"] == "broken"
    by_level = {level: text for level, text in page.answers}
    assert "trait: yes" in by_level["shown"]
    assert "degeneration: yes" in by_level["broken"]
    assert "trait: no" in by_level["absent"]
    assert "degeneration" not in by_level["absent"]


def test_failures_have_reason_and_log(page: Page) -> None:
    failures = page.text["failures"]
    assert failures.index("train: error") < failures.index("sample: skipped")
    assert "no memory" in failures
    assert "line 1" in failures
    assert task_id("train", LABELS[3]) in failures


def test_versions_and_how_to_reproduce(page: Page) -> None:
    reproduce = page.text["reproduce"]
    assert "shiftgrad run 'my sweep.yaml' seed=1" in reproduce
    assert "torch 2.99.1" in reproduce
    assert "git revision null" in reproduce
    assert task_id("train", "none") in reproduce
    assert "abcdef012345" in reproduce


def test_the_same_store_elsewhere_at_another_time_gives_the_same_bytes(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1000000000")
    again = write_report(analysis.load(write_sweep(tmp_path / "other store")), tmp_path / "report")
    for name in ["index.html", *FIGURES]:
        assert (again.parent / name).read_bytes() == (report.parent / name).read_bytes(), name


def test_a_sweep_that_has_not_begun_has_a_report(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, *(entry(label) for label in LABELS))
    path = write_report(analysis.load(sweep), tmp_path / "report")
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    page = Page(path.read_text(encoding="utf-8"))
    assert len([row for row in page.rows if "missing" in row and "not scored" in row]) == 5
    assert "Nothing has been measured yet" in page.text["figures"]
    assert "No training step" in page.text["training"]
    assert "no answers yet" in page.text["samples"]
    assert "no sweep.yaml" in page.text["asked"]
    assert "no provenance.json" in page.text["reproduce"]
    assert "No task failed" in page.text["failures"]


def test_a_training_that_is_under_way_has_its_curve(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, *(entry(label) for label in LABELS))
    write_training(tmp_path, "none", 2)
    path = write_report(analysis.load(sweep), tmp_path / "report")
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"index.html", "training.png", "training.pdf", "training_column.png", "training_column.pdf"}


def test_a_manifest_without_runs_and_a_broken_provenance(tmp_path: Path) -> None:
    write(tmp_path, "sweeps/small/provenance.json", "{not json")
    path = write_report(analysis.load(write_manifest(tmp_path)), tmp_path / "report")
    assert "provenance.json cannot be read" in Page(path.read_text(encoding="utf-8")).text["reproduce"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, "report/mine.txt", "precious")
    with pytest.raises(StoreError, match="not empty"):
        write_report(analysis.load(write_manifest(tmp_path)), tmp_path / "report")
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["mine.txt"]


def test_clean() -> None:
    assert clean("\x1b[36m(pid=1)\x1b[0m a\tb\r\nc\x07\x7f") == "(pid=1) a\tb\nc␇␡"
