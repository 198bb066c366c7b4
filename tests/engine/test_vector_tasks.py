"""Named vectors: which shapes and tasks they have for a base, and what is wrong with those that have none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save

from analysis.vectors import (
    CombinedVector,
    Difference,
    DifferenceVector,
    FileVector,
    PromptDifference,
    PromptDifferenceVector,
    RandomVector,
    Term,
    VectorConfig,
)
from engine.sources import Sources
from engine.vector_tasks import VectorTasks
from tests.bases import chat
from tests.engine.tiny_prepare import write_vector
from tests.engine.tiny_sweep import write_chat_file, write_tiny_sweep
from trainables.base_model import ResolvedBase
from trainables.errors import Fault
from trainables.shapes import FinalRow, ModelShape, VectorShape

BASE = ResolvedBase(model="org/model", revision="abc", dtype="float32", source="org/model")
OTHER = ResolvedBase(model="org/model", revision="def", dtype="float32", source="org/model")
SHAPE = ModelShape(num_layers=4, hidden_size=32, vocab_size=300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_chat_file(tmp_path / "a.jsonl", [chat("Why?", "So.")])
    write_chat_file(tmp_path / "b.jsonl", [chat("Why?", "No.")])
    return tmp_path


def _difference(positive: str = "a.jsonl", negative: str = "b.jsonl") -> DifferenceVector:
    return DifferenceVector(difference=Difference(positive=positive, negative=negative, max_length=64))


def _vectors(folder: Path, configs: Mapping[str, VectorConfig]) -> VectorTasks:
    return VectorTasks(configs, Sources(folder, cuda=False, faults=[]))


def _nothing(base: ResolvedBase, content: str, max_length: int, key: str) -> None:
    del base, content, max_length, key


class TestShape:
    def test_of_what_is_made_here(self, folder: Path) -> None:
        vectors = _vectors(folder, {"topic": _difference(), "random": RandomVector(random_like="topic")})
        for name in ("topic", "random"):
            assert vectors.shape(name, BASE, SHAPE) == VectorShape(4, 32, "pre_norm")
        assert vectors.sources.faults == []

    @pytest.mark.parametrize("final_row", ["pre_norm", "post_norm", "absent"])
    def test_of_a_file_and_of_what_is_like_it(self, folder: Path, final_row: FinalRow) -> None:
        write_vector(folder / "v.safetensors", final_row=final_row)
        vectors = _vectors(
            folder,
            {
                "own": FileVector(file="v.safetensors"),
                "random": RandomVector(random_like="own"),
                "again": RandomVector(random_like="random"),
            },
        )
        for name in ("own", "random", "again"):
            assert vectors.shape(name, BASE, SHAPE) == VectorShape(4, 32, final_row)

    @pytest.mark.parametrize(("layers", "hidden"), [(5, 32), (3, 32), (4, 64)])
    def test_of_another_model_size(self, folder: Path, layers: int, hidden: int) -> None:
        write_vector(folder / "v.safetensors", layers, hidden)
        vectors = _vectors(folder, {"own": FileVector(file="v.safetensors"), "like": RandomVector(random_like="own")})
        assert vectors.shape("own", BASE, SHAPE) is None
        assert vectors.shape("like", BASE, SHAPE) is None
        (fault,) = dict.fromkeys(vectors.sources.faults)
        assert fault.key == "vectors.own.file"
        assert f"has {layers} layers of hidden size {hidden}; org/model has 4 layers of hidden size 32" in fault.message

    def test_of_another_model(self, folder: Path) -> None:
        write_vector(folder / "v.safetensors", model="org/model", revision="abc")
        vectors = _vectors(folder, {"own": FileVector(file="v.safetensors")})
        assert vectors.shape("own", BASE, SHAPE) is not None
        assert vectors.shape("own", OTHER, SHAPE) is None
        (fault,) = vectors.sources.faults
        assert fault.key == "vectors.own.file"
        assert "made for org/model (abc)" in fault.message
        assert "starts from org/model (def)" in fault.message

    def test_a_circle_ends(self, folder: Path) -> None:
        circle: dict[str, VectorConfig] = {"a": RandomVector(random_like="b"), "b": RandomVector(random_like="a")}
        vectors = _vectors(folder, circle)
        assert vectors.shape("a", BASE, SHAPE) is None
        assert vectors.shape("unknown", BASE, SHAPE) is None


class TestFiles:
    def test_that_are_missing(self, folder: Path) -> None:
        vectors = _vectors(
            folder,
            {"own": FileVector(file="no.safetensors"), "topic": _difference("no.jsonl", "b.jsonl")},
        )
        assert [fault.key for fault in vectors.sources.faults] == [
            "vectors.own.file",
            "vectors.topic.difference.positive",
        ]
        assert all(str(folder) in fault.message for fault in vectors.sources.faults)
        assert vectors.shape("topic", BASE, SHAPE) is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "cannot be read"),
            (b"\x00" * 100, "cannot be read"),
            (save({"vector": torch.ones(5, 32)}), "final_row None"),
            (save({"other": torch.ones(5, 32)}, {"final_row": "pre_norm"}), "holds tensors ['other']"),
            (save({"vector": torch.ones(5)}, {"final_row": "pre_norm"}), "shape [5]"),
            (save({"vector": torch.ones(5, 32).half()}, {"final_row": "pre_norm"}), "dtype F16"),
            (save({"vector": torch.ones(5, 32)}, {"final_row": "other"}), "final_row 'other'"),
        ],
    )
    def test_that_are_no_vectors(self, folder: Path, content: bytes, message: str) -> None:
        (folder / "v.safetensors").write_bytes(content)
        (fault,) = _vectors(folder, {"own": FileVector(file="v.safetensors")}).sources.faults
        assert fault.key == "vectors.own.file"
        assert message in fault.message
        assert "a safetensors file with one float32 tensor 'vector'" in fault.message


class TestAdd:
    def test_recipes(self, folder: Path) -> None:
        write_vector(folder / "v.safetensors")
        vectors = _vectors(
            folder,
            {
                "topic": _difference(),
                "random": RandomVector(random_like="topic", seed=3),
                "own": FileVector(file="v.safetensors"),
            },
        )
        proved: list[tuple[str, int, str]] = []

        def prove(base: ResolvedBase, content: str, max_length: int, key: str) -> None:
            assert base == BASE
            proved.append((content, max_length, key))

        made = {name: vectors.add(name, BASE, prove) for name in ("random", "own")}
        random, own = (vectors.jobs[made[name]].vector for name in ("random", "own"))
        topic = vectors.jobs[vectors.ids["topic"]].vector
        assert isinstance(topic, DifferenceVector)
        assert random == RandomVector(random_like=vectors.ids["topic"], seed=3)
        assert [vectors.jobs[made[name]].name for name in ("random", "own")] == ["random", "own"]
        assert isinstance(own, FileVector)
        assert vectors.sources.inputs[own.file] == (folder / "v.safetensors").read_bytes()
        assert proved == [
            (topic.difference.positive, 64, "vectors.topic.difference.positive"),
            (topic.difference.negative, 64, "vectors.topic.difference.negative"),
        ]
        assert [job.label for job in vectors.jobs.values()] == ["vector topic", "vector random", "vector own"]

    def test_ids_are_those_of_the_vectors_in_stores(self, folder: Path) -> None:
        """Computed before kinds had files of their own: vectors that are in stores keep their ids."""
        write_vector(folder / "v.safetensors")
        vectors = _vectors(
            folder,
            {
                "topic": _difference(),
                "random": RandomVector(random_like="topic", seed=3),
                "own": FileVector(file="v.safetensors"),
                "again": RandomVector(random_like="own"),
            },
        )
        assert {name: vectors.add(name, BASE, _nothing) for name in vectors.configs} == {
            "topic": "c6cab6c7b291",
            "random": "b0a6e767b9eb",
            "own": "ca995da75925",
            "again": "2b655b44ec7f",
        }

    def test_what_is_made_of_others_comes_after_them(self, folder: Path) -> None:
        vectors = _vectors(
            folder,
            {
                "sum": CombinedVector(combine=(Term(vector="random", weight=0.5), Term(vector="topic"))),
                "random": RandomVector(random_like="topic"),
                "topic": _difference(),
            },
        )
        assert vectors.shape("sum", BASE, SHAPE) == VectorShape(4, 32, "pre_norm")
        job = vectors.jobs[vectors.add("sum", BASE, _nothing)]
        assert job.parents == (vectors.ids["random"], vectors.ids["topic"])
        assert list(vectors.jobs) == [vectors.ids[name] for name in ("topic", "random", "sum")]
        assert isinstance(job.vector, CombinedVector)
        assert [(term.vector, term.weight) for term in job.vector.combine] == [
            (vectors.ids["random"], 0.5),
            (vectors.ids["topic"], 1.0),
        ]

    def test_prompts_of_a_trait_become_texts(self, folder: Path) -> None:
        write_tiny_sweep(folder / "tiny")
        given = PromptDifference(rows="a.jsonl", prompts="topic", max_length=64)
        texts = ("Talk about bridges.", "Mention a bridge, please.")
        vectors = _vectors(folder / "tiny", {"ip": PromptDifferenceVector(prompt_difference=given)})
        assert "no file 'a.jsonl'" in vectors.sources.faults[0].message
        write_chat_file(folder / "tiny" / "a.jsonl", [chat("Why?", "So.")])
        named = _vectors(folder / "tiny", {"ip": PromptDifferenceVector(prompt_difference=given)})
        listed = given.model_copy(update={"prompts": texts})
        same = _vectors(folder / "tiny", {"ip": PromptDifferenceVector(prompt_difference=listed)})
        assert named.add("ip", BASE, _nothing) == same.add("ip", BASE, _nothing)
        (job,) = named.jobs.values()
        assert isinstance(job.vector, PromptDifferenceVector)
        assert job.vector.prompt_difference.prompts == texts

    def test_once_per_base(self, folder: Path) -> None:
        vectors = _vectors(folder, {"topic": _difference(), "topic2": _difference()})
        first = [vectors.add("topic", BASE, _nothing) for _ in range(2)]
        second = vectors.add("topic", OTHER, _nothing)
        assert first[0] == first[1] != second
        assert vectors.add("topic", BASE, _nothing) == first[0]
        assert vectors.ids == {"topic": first[0], "topic #2": second}
        assert vectors.add("topic2", BASE, _nothing) == first[0]
        assert vectors.ids["topic2"] == first[0]
        assert list(vectors.jobs) == [first[0], second]

    def test_a_file_is_the_same_for_every_base(self, folder: Path) -> None:
        write_vector(folder / "v.safetensors")
        vectors = _vectors(folder, {"own": FileVector(file="v.safetensors")})
        assert vectors.add("own", BASE, _nothing) == vectors.add("own", OTHER, _nothing)
        assert list(vectors.ids) == ["own"]


def test_faults_stay_with_the_key_that_names_the_file(folder: Path) -> None:
    sources = Sources(folder, cuda=False, faults=[])
    assert sources.chat_file("no.jsonl", "data.train") is None
    assert sources.chat_file("no.jsonl", "runs[1].data.train") is None
    assert [fault.key for fault in sources.faults] == ["data.train", "runs[1].data.train"]
    (folder / "bad.jsonl").write_text("{")
    sources.faults.clear()
    for key in ("data.train", "runs[1].data.train"):
        assert sources.chat_file("bad.jsonl", key) is None
    assert len(set(sources.faults)) == 1
    assert sources.faults[0] == Fault(f"{folder / 'bad.jsonl'}:1", sources.faults[0].message)


class TestAxes:
    SETS: ClassVar = {"positive": "a.jsonl", "negative": "b.jsonl"}

    def _one(self, folder: Path, kind: str, **more: object) -> VectorTasks:
        config = TypeAdapter(VectorConfig).validate_python({kind: self.SETS | more})
        return _vectors(folder, {"axis": config})

    def test_each_estimator_and_each_of_its_settings_is_another_vector(self, folder: Path) -> None:
        made = [
            self._one(folder, "leading_difference"),
            self._one(folder, "contrastive"),
            self._one(folder, "contrastive", temperature=2.0),
            self._one(folder, "logistic"),
            self._one(folder, "logistic", inverse_penalty=0.1),
        ]
        assert len({vectors.add("axis", BASE, _nothing) for vectors in made}) == len(made)
        assert all(not vectors.sources.faults for vectors in made)

    @pytest.mark.parametrize("kind", ["leading_difference", "contrastive", "logistic"])
    def test_one_class_only_is_a_fault(self, folder: Path, kind: str) -> None:
        vectors = self._one(folder, kind, negative="a.jsonl")
        (fault,) = vectors.sources.faults
        assert fault.key == f"vectors.axis.{kind}.negative"
        assert "an axis needs two classes" in fault.message

    def test_pairs_need_equal_numbers_of_rows(self, folder: Path) -> None:
        write_chat_file(folder / "c.jsonl", [chat("Why?", "No."), chat("How?", "Like that.")])
        (fault,) = self._one(folder, "leading_difference", negative="c.jsonl").sources.faults
        message = "has 2 rows and positive has 1; pairs need as many of one as of the other"
        assert fault == Fault("vectors.axis.leading_difference.negative", message)
        assert self._one(folder, "contrastive", negative="c.jsonl").sources.faults == []
