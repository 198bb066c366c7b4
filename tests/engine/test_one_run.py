"""One run from Python: its settings, files and tables, and its model, which is the one that was sampled from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from analysis.results import Results, load
from engine.ask import ask
from engine.machine import read_machine
from engine.prepare import Prepared, prepare
from engine.run import write_sweep
from engine.store import Store
from engine.tasks import RunJob
from engine.work import SweepWork
from tests.engine.finished import write_finished
from tests.engine.tiny_sweep import write_tiny_sweep
from trainables.errors import ConfigError
from trainables.model_parts import decoder_layers
from trainables.residual_stream import ReadValue, residual_stream
from trainables.sample import SamplingConfig

RUNS = """\
  - defense: none
  - defense: {kind: pps, vector: topic, layer: 2, coefficient: 1.5}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(write_tiny_sweep(tmp_path_factory.mktemp("one run"), runs=RUNS), (), read_machine())


@pytest.fixture(scope="module")
def trained(prepared: Prepared) -> Results:
    """The run ``none`` and what it needs done in this process, without Ray; the other run not."""
    store = Store.open(prepared.sweep.results, create=True)
    write_sweep(prepared, store)
    work = SweepWork(
        store=store, jobs=prepared.jobs, device="cpu", threads=1, zero_stage=0, gradient_checkpointing=False
    )
    for job in prepared.jobs.values():
        if not (isinstance(job, RunJob) and job.label.startswith("pps")):
            work.run(job.id, lambda **_: None)
    return load(store.root / "sweeps" / "tiny")


@pytest.fixture(scope="module")
def folder(prepared: Prepared) -> Path:
    """The base's."""
    return prepared.sweep.path.parent / "model"


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


class TestModel:
    def test_is_the_base_with_the_adapter(self, trained: Results, folder: Path, random_ids: torch.Tensor) -> None:
        model, tokenizer = trained.load_model("none")
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        before = logits(plain, random_ids)
        expected = logits(PeftModel.from_pretrained(plain, trained.run("none").adapter).eval(), random_ids)
        assert torch.equal(logits(model, random_ids), expected)
        assert not torch.equal(before, expected)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert tokenizer.padding_side == "left"
        base, _ = trained.load_model("base", device="cpu")
        assert torch.equal(logits(base, random_ids), before)

    def test_answers_as_the_command_line_does(self, trained: Results) -> None:
        """``ask`` is what ``shiftgrad sample`` prints."""
        model, tokenizer = trained.load_model("none")
        message = [{"role": "user", "content": "How are you?"}]
        inputs: Any = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        greedy = SamplingConfig(temperature=0, max_new_tokens=8)
        (answer,) = ask(trained, trained.run("none").entry, "How are you?", greedy)
        assert tokenizer.decode(output, skip_special_tokens=True) == answer

    def test_has_the_layers_that_the_documents_say(self, trained: Results, random_ids: torch.Tensor) -> None:
        model, _ = trained.load_model("none")
        num_layers = len(decoder_layers(model))
        read: dict[int, torch.Tensor] = {}
        readers = [ReadValue(layer, read.__setitem__) for layer in range(num_layers + 1)]
        with torch.no_grad(), residual_stream(model, [], readers):
            theirs = model(input_ids=random_ids, output_hidden_states=True).hidden_states
        assert len(theirs) == num_layers + 1
        assert all(torch.equal(read[layer], theirs[layer]) for layer in range(num_layers))
        assert not torch.equal(read[num_layers], theirs[num_layers]), "theirs is after the final norm"
        assert trained.vector("topic").values.shape == (num_layers + 1, theirs[0].shape[-1])

    def test_of_a_run_that_is_not_done_is_refused(self, trained: Results) -> None:
        with pytest.raises(ConfigError, match=r"'pps topic L2 x1\.5' is not done: it has no adapter yet"):
            trained.load_model("pps topic L2 x1.5")
        with pytest.raises(ConfigError, match="no run is called 'nonesuch'"):
            trained.load_model("nonesuch")

    def test_needs_the_same_base_wherever_it_lies(
        self, trained: Results, folder: Path, tmp_path: Path, random_ids: torch.Tensor
    ) -> None:
        expected = logits(trained.load_model("none")[0], random_ids)
        moved, other = tmp_path / "moved", tmp_path / "other"
        shutil.copytree(folder, other)
        weights = bytearray((other / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (other / "model.safetensors").write_bytes(weights)
        folder.rename(moved)
        try:
            with pytest.raises(ConfigError, match=r"cannot be opened .* if it lies elsewhere, say where by base"):
                trained.load_model("none")
            assert torch.equal(logits(trained.load_model("none", base=str(moved))[0], random_ids), expected)
            for run in ("none", "base"):
                with pytest.raises(ConfigError, match="is not the base that the sweep used: its revision is"):
                    trained.load_model(run, base=str(other))
        finally:
            moved.rename(folder)

    def test_vectors_that_are_not_there(self, trained: Results) -> None:
        with pytest.raises(ConfigError, match="no vector 'topi'; vectors: topic"):
            trained.vector("topi")
        path = trained.root / "vectors" / f"{trained.manifest.vectors['topic']}.safetensors"
        path.rename(path.with_suffix(".aside"))
        try:
            with pytest.raises(ConfigError, match="'topic' is not made yet"):
                trained.vector("topic")
        finally:
            path.with_suffix(".aside").rename(path)


class TestRun:
    @pytest.fixture(scope="class")
    def results(self, tmp_path_factory: pytest.TempPathFactory) -> Results:
        prepared = prepare(write_tiny_sweep(tmp_path_factory.mktemp("finished")), (), read_machine())
        store = write_finished(prepared, failed="none")
        return load(store.root / "sweeps" / "tiny")

    def test_is_found_by_label_and_by_the_beginning_of_its_id(self, results: Results) -> None:
        run = results.run("pps topic L2 x1.5")
        assert results.run(run.run_id[:7]) == run
        assert repr(run) == f"<Run 'pps topic L2 x1.5' ({run.run_id}) of tiny: done>"
        assert repr(results.run("base")).startswith("<Base 'base' (")

    def test_knows_its_settings_and_how_it_stands(self, results: Results) -> None:
        run, failed = results.run("pps topic L2 x1.5"), results.run("none")
        assert (run.status, run.reason) == ("done", None)
        assert run.config["defense.layer"] == 2
        assert run.config["training.schedule"] == "linear", "defaults too"
        assert (failed.status, failed.reason) == ("failed", "TrainingError: run x, step 2: the loss is [nan]")

    def test_has_the_rows_of_the_sweeps_tables_that_are_its_own(self, results: Results) -> None:
        run = results.run("pps topic L2 x1.5")
        for name in ("training", "generations", "scores", "losses"):
            whole = getattr(results, name)()
            own = whole[whole["run"] == run.label].reset_index(drop=True)
            assert 0 < len(own) < len(whole)
            pd.testing.assert_frame_equal(getattr(run, name)(), own)
        row = results.summary().set_index("run").loc[run.label]
        assert run.summary()["trait"] == row["trait"]
        assert len(results.run("none").generations()) == 0

    def test_has_its_files(self, results: Results) -> None:
        run = results.run("pps topic L2 x1.5")
        assert run.record is not None
        assert run.record["num_steps"] == 2
        assert run.adapter is None, "this store was written without one"
        assert run.log == ""
        (results.root / "runs" / run.run_id / "log.txt").write_text("one\ntwo\n")
        assert run.log == "one\ntwo\n", "it reads the store as it is now"
        assert results.run("none").record is None
        assert results.run("base").record is None
        assert results.run("base").adapter is None


class TestNotebookPage:
    @pytest.fixture
    def results(self, tmp_path: Path) -> Results:
        runs = "  - {label: '<b>none</b>', defense: none}\n  - {label: plain, defense: none, seed: 1}\n"
        prepared = prepare(write_tiny_sweep(tmp_path, runs=runs), (), read_machine())
        store = write_finished(prepared, failed="<b>none</b>")
        return load(store.root / "sweeps" / "tiny")

    def test_of_results_is_one_line_and_a_table(self, results: Results) -> None:
        assert repr(results).startswith("<Results tiny: 1 base and 2 runs: 2 done, 1 failed; ")
        page = results._repr_html_()
        assert "tiny: 1 base and 2 runs: 2 done, 1 failed" in page
        assert "0.50 (0.20 to 0.80)" in page, "a standard error of 0 is no certainty"
        assert "&lt;b&gt;none&lt;/b&gt;" in page
        assert "<b>none" not in page
        assert "the loss is [nan]" in page, "why runs failed stands below"

    def test_of_a_run_is_what_the_command_line_shows(self, results: Results) -> None:
        page = results.run("plain")._repr_html_()
        for part in ("plain (", "training.learning_rate", "0.20 to 0.80", "How are you?", "[brackets]"):
            assert part in page
        (results.root / "runs" / results.run("plain").run_id / "log.txt").write_text("<i>line</i>\x1b[31m\n")
        assert "&lt;i&gt;line&lt;/i&gt;</pre>" in results.run("plain")._repr_html_()
        failed = results.run("<b>none</b>")._repr_html_()
        assert "nothing was measured yet" in failed
        assert "the loss is [nan]" in failed
        assert "<b>none" not in failed
