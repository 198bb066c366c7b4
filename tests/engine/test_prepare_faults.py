"""Bad input: every fault in one message, under the user's own key, before anything starts, with nothing touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.machine import Machine
from tests.bases import chat
from tests.engine.tiny_prepare import TinySweep, add_long_question, entries, tiny_model_folder, write_vector
from tests.engine.tiny_sweep import write_chat_file, write_tiny_model
from tests.tiny import CHATML

PPS = {"kind": "pps", "vector": "topic", "layer": 2, "coefficient": 1.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory)


@pytest.fixture
def sweep(tmp_path: Path, model: Path) -> TinySweep:
    return TinySweep(tmp_path / "sweep", model)


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


class TestBadInput:
    def test_everything_at_once_and_nothing_is_touched(self, sweep: TinySweep, tmp_path: Path) -> None:
        folder = sweep.folder
        sweep.raw["name"] = "faulty"
        sweep.raw["trainig"] = {}
        sweep.raw["training"]["epochs"] = "many"
        sweep.raw["training"]["learning_rat"] = 1
        (folder / "data" / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"mess\n')
        (folder / "data" / "positive.jsonl").write_text("\n")
        sweep.raw["vectors"]["topic"]["difference"]["negative"] = "data/nowhere.jsonl"
        write_vector(folder / "wide.safetensors", hidden=64)
        write_vector(folder / "foreign.safetensors", model="folder", revision="0" * 64)
        write_vector(folder / "normed.safetensors", final_row="post_norm")
        for name in ("wide", "foreign", "normed"):
            sweep.raw["vectors"][name] = {"file": f"{name}.safetensors"}
        sweep.raw["runs"] = [
            {"defense": {**PPS, "layer": 0}},
            {"defense": {**PPS, "layer": 5}},
            {"defense": {**PPS, "vector": "wide"}},
            {"defense": {**PPS, "vector": "foreign"}},
            {"defense": {**PPS, "vector": "normed", "layer": 4}},
            {"defense": {"kind": "inoculation", "prompts": "nothing"}},
            {"defense": {**PPS, "layer": {"grid": []}}},
            {"defense": "none"},
            {"defense": "none"},
        ]
        sweep.raw["evaluation"]["metrics"]["other"] = {"judge": "rule", "trait": "missing"}
        sweep.raw["execution"] = {"cpus_per_trial": 9, "gpus_per_trial": 1, "memory_gb_per_trial": 99}
        (folder / "results").write_text("a file")
        sweep.file.write_text("placeholder, so that the listing knows the file")
        sweep.faults()
        before = _listing(tmp_path)
        faults = sweep.faults()
        after = _listing(tmp_path)
        for listing in (before, after):
            listing.pop(str(sweep.file))  # which this test itself writes
        assert after == before
        train = folder / "data" / "train.jsonl"
        assert set(faults) == {
            "trainig",
            "training.epochs",
            "training.learning_rat",
            f"{train}:1",
            f"{train}:2",
            str(folder / "data" / "positive.jsonl"),
            "vectors.topic.difference.negative",
            "vectors.wide.file",
            "vectors.foreign.file",
            "runs[0].defense.layer",
            "runs[1].defense.layer",
            "runs[4].defense.layer",
            "runs[5].defense.prompts",
            "runs[6].defense.layer",
            "runs",
            "evaluation.metrics.other.trait",
            "execution.cpus_per_trial",
            "execution.gpus_per_trial",
            "execution.memory_gb_per_trial",
            "results",
        }
        assert faults["trainig"].startswith("unknown key; did you mean training?")
        assert "did you mean learning_rate?" in faults["training.learning_rat"]
        assert faults["training.epochs"] == "must be a number; got 'many'"
        assert faults[f"{train}:1"] == "no assistant turn"
        assert faults[f"{train}:2"].startswith("not JSON")
        assert "is empty" in faults[str(folder / "data" / "positive.jsonl")]
        assert "no file 'data/nowhere.jsonl'; looked at " in faults["vectors.topic.difference.negative"]
        assert "4 layers of hidden size 64" in faults["vectors.wide.file"]
        assert "was made for folder" in faults["vectors.foreign.file"]
        assert "layer 0 is the embedding output" in faults["runs[0].defense.layer"]
        assert "layers 1 to 4" in faults["runs[1].defense.layer"]
        assert "last row is post-norm" in faults["runs[4].defense.layer"]
        assert faults["runs[5].defense.prompts"].startswith("no trait 'nothing'")
        assert "the grid is empty" in faults["runs[6].defense.layer"]
        assert faults["runs"] == "two cells are the same: runs[7] and runs[8]; let them differ or remove one"
        assert faults["execution.cpus_per_trial"] == "9 CPUs asked for; this machine has 4"
        assert "is a file" in faults["results"]

    def test_a_sound_sweep_is_prepared_without_a_trace(self, sweep: TinySweep, tmp_path: Path) -> None:
        sweep.prepare()
        before = _listing(tmp_path)
        before.pop(str(sweep.file))
        sweep.prepare()
        after = _listing(tmp_path)
        after.pop(str(sweep.file))
        assert after == before
        assert not (sweep.folder / "results").exists()

    def test_faults_of_values_beside_unknown_keys(self, sweep: TinySweep) -> None:
        faults = sweep.faults("training.learning_rat=1", "runs.1.defense.layer=77", "evaluation.questions=brige")
        assert set(faults) == {"training.learning_rat", "runs[1].defense.layer", "evaluation.questions"}

    @pytest.mark.parametrize(
        ("overrides", "keys"),
        [
            (["base.dtyp=x", "runs.1.defense.layer=9"], {"base.dtyp", "runs[1].defense.layer"}),
            (["base.dtype=x", "runs.1.defense.layer=9"], {"base.dtype", "runs[1].defense.layer"}),
            (["data.max_length=1", "data.train=no.jsonl"], {"data.max_length", "data.train"}),
            (
                ["runs.1.defense.layr=9", "runs.1.defense.layer=9", "runs.2.defense.vector=randm"],
                {"runs[1].defense.layr", "runs[1].defense.layer", "runs[2].defense.vector"},
            ),
            (
                ["runs.1.defense.layer=x", "runs.1.defense.vector=y"],
                {"runs[1].defense.layer", "runs[1].defense.vector"},
            ),
            (
                ["runs.3.defense.prompt=x", "runs.3.defense.prompts=y"],
                {"runs[3].defense.prompt", "runs[3].defense.prompts"},
            ),
            (
                ["evaluation.samples=0", "evaluation.plain_answers=p"],
                {"evaluation.samples", "evaluation.plain_answers"},
            ),
            (
                ["evaluation.metrics.a={judge: rule, trait: x}", "evaluation.metrics.b={judge: rle}", "data.train=n"],
                {"evaluation.metrics.a.trait", "evaluation.metrics.b.judge", "data.train"},
            ),
            (["evaluation.metrics=null", "evaluation.questions=x"], {"evaluation.metrics", "evaluation.questions"}),
            (["name=a b", "results=s3://bucket/x"], {"name", "results"}),
            (["name=a b", "execution.cpus_per_trial=77"], {"name", "execution.cpus_per_trial"}),
            (
                ["execution.trial=1", "execution.cpus_per_trial=77", "data.train=n"],
                {"execution.trial", "execution.cpus_per_trial", "data.train"},
            ),
            (["vectors.topic.differenc=1", "data.train=n"], {"vectors.topic.differenc", "data.train"}),
            (["runs.1.defense.layer={grid: []}", "data.train=n"], {"runs[1].defense.layer", "data.train"}),
            (["runs=[{defense: none, seed: {grid: []}}]", "training.x=1"], {"runs[0].seed", "training.x"}),
            (["runs=[{grid: []}]", "training.x=1", "data.train=n"], {"runs[0]", "training.x", "data.train"}),
            (["training={}", "axes.training.learning_rate={grid: []}"], {"axes.training.learning_rate"}),
            (["data=3", "evaluation.questions=x"], {"data", "evaluation.questions"}),
            (["vectors.random.random_like=random"], {"vectors.random.random_like"}),
        ],
    )
    def test_as_many_as_can_be_found_together(self, sweep: TinySweep, overrides: list[str], keys: set[str]) -> None:
        assert set(sweep.faults(*overrides)) == keys

    def test_the_same_missing_file_under_each_of_its_keys(self, sweep: TinySweep) -> None:
        (sweep.folder / "data" / "positive.jsonl").unlink()
        sweep.raw["data"]["train"] = "data/positive.jsonl"
        sweep.raw["runs"][1]["data"] = {"train": "data/positive.jsonl"}
        sweep.raw["runs"][2]["evaluation"] = {"questions": "x"}
        sweep.raw["runs"][3]["evaluation"] = {"questions": "x"}
        assert set(sweep.faults()) == {
            "vectors.topic.difference.positive",
            "data.train",
            "runs[1].data.train",
            "runs[2].evaluation.questions",
            "runs[3].evaluation.questions",
        }

    def test_two_cells_with_one_identity(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none", "label": "one"}, {"defense": [], "label": "two"}]
        message = sweep.faults()["runs"]
        assert "two cells have one identity (" in message
        assert "'one' and 'two'" in message

    def test_a_vector_by_two_names_is_one_identity(self, sweep: TinySweep) -> None:
        sweep.raw["vectors"]["same"] = sweep.raw["vectors"]["topic"]
        sweep.raw["runs"] = [{"defense": PPS}, {"defense": {**PPS, "vector": "same"}}]
        assert "'pps topic L2 x1.5' and 'pps same L2 x1.5'" in sweep.faults()["runs"]

    def test_metrics_by_other_names_are_one_identity(self, sweep: TinySweep) -> None:
        metric = sweep.raw["evaluation"].pop("metrics")["trait"]
        sweep.raw["runs"] = [{"defense": "none", "evaluation": {"metrics": {name: metric}}} for name in ("a", "b")]
        assert "two cells have one identity" in sweep.faults()["runs"]

    def test_one_identity_beside_other_faults(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none"}, {"defense": "none"}, {"defense": {**PPS, "layer": 9}}]
        assert set(sweep.faults()) == {"runs", "runs[2].defense.layer"}
        assert set(sweep.faults("data.train=x")) == {"runs", "runs[2].defense.layer", "data.train"}
        assert set(sweep.faults("training.x=1")) == {"runs", "runs[2].defense.layer", "training.x"}

    def test_a_typo_that_should_tell_two_cells_apart_makes_no_twins(self, sweep: TinySweep) -> None:
        sweep.raw["runs"] = [{"defense": "none"}, {"defense": "none", "sede": 1}]
        assert set(sweep.faults()) == {"runs[1].sede"}

    @pytest.mark.parametrize("label", ["base", "base #2"])
    def test_a_label_that_the_base_has(self, sweep: TinySweep, label: str) -> None:
        sweep.raw["runs"][1]["label"] = label
        assert "what the untrained base is called" in sweep.faults()["runs[1].label"]

    @pytest.mark.parametrize("name", ["status", "train_loss", "trait_se"])
    def test_metrics_that_clash_in_the_summary(self, sweep: TinySweep, name: str) -> None:
        sweep.raw["evaluation"]["metrics"][name] = {"judge": "rule", "trait": "topic"}
        assert sweep.faults() == {"evaluation.metrics": f"the summary would have two columns {name!r}; rename one"}

    def test_degeneration_cannot_be_something_else(self, sweep: TinySweep) -> None:
        sweep.raw["evaluation"]["metrics"]["degeneration"] = {"judge": "rule", "trait": "topic"}
        assert "that every sweep has" in sweep.faults()["evaluation.metrics.degeneration"]

    def test_traits_that_lack_what_is_asked_of_them(self, sweep: TinySweep) -> None:
        trait = sweep.folder / "traits" / "bare" / "trait.yaml"
        trait.parent.mkdir()
        trait.write_text("name: bare\ndescription: Nothing.\nquestions: [{id: a, question: 'How?'}]\n")
        faults = sweep.faults(
            "evaluation.questions=bare", "evaluation.metrics.trait.trait=bare", "runs.3.defense.prompts=bare"
        )
        assert faults == {
            "evaluation.questions": "trait 'bare' has no plain_answers; give evaluation.plain_answers",
            "evaluation.metrics.trait.trait": "trait 'bare' has no rule; give patterns instead",
            "runs[3].defense.prompts": "trait 'bare' has no inoculation_prompts",
        }

    def test_a_broken_trait(self, sweep: TinySweep) -> None:
        sweep.replace("traits/topic/trait.yaml", "description:", "descripton:")
        keys = set(sweep.faults())
        file = sweep.folder / "traits" / "topic" / "trait.yaml"
        assert keys == {f"{file}: descripton", f"{file}: description"}

    @pytest.mark.parametrize(
        ("overrides", "key", "file"),
        [
            ([], "data.train", "data/train.jsonl"),
            (["runs.1.training.max_steps=1"], "data.train", "data/train.jsonl"),
            ([], "vectors.topic.difference.positive", "data/positive.jsonl"),
            ([], "vectors.topic.difference.negative", "data/negative.jsonl"),
            ([], "evaluation.questions", "data/plain_answers.jsonl"),
            (["evaluation.plain_answers=data/other.jsonl"], "evaluation.plain_answers", "data/other.jsonl"),
        ],
    )
    def test_a_response_that_is_truncated_away(
        self, sweep: TinySweep, overrides: list[str], key: str, file: str
    ) -> None:
        write_chat_file(sweep.folder / "data" / "other.jsonl", [chat("Why?", "So.")])
        add_long_question(sweep, file)
        message = sweep.faults(*overrides)[key]
        assert "have their whole response beyond max_length=128 tokens" in message
        assert "1 of " in message

    def test_a_base_that_is_not_there_or_not_whole(self, sweep: TinySweep, tmp_path: Path) -> None:
        assert "'nowhere/at/all' cannot be opened" in sweep.faults("base.model=nowhere/at/all")["base.model"]
        for file in (sweep.folder / "model").glob("*token*"):
            file.unlink()
        assert "the tokenizer of" in sweep.faults()["base.model"]
        write_tiny_model(tmp_path / "mute")
        (tmp_path / "mute" / "chat_template.jinja").unlink()
        sweep.raw["base"]["model"] = str(tmp_path / "mute")
        assert "has no chat template" in sweep.faults()["base.model"]

    def test_a_folder_that_is_no_store(self, sweep: TinySweep) -> None:
        (sweep.folder / "results").mkdir()
        (sweep.folder / "results" / "thesis.tex").touch()
        assert "is not a shiftgrad store" in sweep.faults()["results"]
        assert "is a file" in sweep.faults(f"results={sweep.file}/below")["results"]

    def test_more_than_the_machine(self, sweep: TinySweep) -> None:
        sweep.raw["execution"] = {"cpus_per_trial": 3, "gpus_per_trial": 1, "memory_gb_per_trial": 5}
        assert sweep.prepare(machine=Machine(3, 1.0, 5.0)).num_trials == 1
        assert set(sweep.faults(machine=Machine(2, 0.0, 4.0))) == {
            "execution.cpus_per_trial",
            "execution.gpus_per_trial",
            "execution.memory_gb_per_trial",
        }

    def test_a_hub_dataset_from_a_folder(self, sweep: TinySweep) -> None:
        before = sweep.prepare()
        local = sweep.folder / "hub"
        local.mkdir()
        (sweep.folder / "data" / "train.jsonl").rename(local / "train.jsonl")
        sweep.raw["data"]["train"] = {"hub": str(local)}
        assert entries(sweep.prepare())["none"].run_id == entries(before)["none"].run_id
        assert "no column 'talk'" in sweep.faults("data.train.messages=talk")["data.train"]

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (
                "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML,
                "the chat template refuses roles [system, user]: no system role; put the system prompt into",
            ),
            (
                CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}"),
                "the base's chat template leaves the system prompt out",
            ),
        ],
    )
    def test_a_system_prompt_that_the_chat_template_has_no_place_for(
        self, sweep: TinySweep, template: str, message: str
    ) -> None:
        assert sweep.prepare("evaluation.system_prompt=Be brief.").jobs, "the usual template has one"
        (sweep.folder / "model" / "chat_template.jinja").write_text(template)
        assert sweep.prepare().jobs
        faults = sweep.faults("evaluation.system_prompt=Be brief.")
        assert set(faults) == {"evaluation.system_prompt"}
        assert message in faults["evaluation.system_prompt"]
        sweep.raw["runs"][1]["evaluation"] = {"system_prompt": "Be brief."}
        assert set(sweep.faults()) == {"runs[1].evaluation.system_prompt"}
