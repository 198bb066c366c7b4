"""Vectors of other projects: which row is which layer, where the final norm lies, what is asked, what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.formats import WRITERS, Hints, MadeVector, one_vector, open_file
from analysis.vectors import Vector
from tests.foreign import HIDDEN, LAYERS, matrix, persona_vector, repeng_gguf, save
from trainables.errors import ConfigError


def faults(path: Path, **hints: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_file(path, Hints(**hints))
    return "\n".join(map(str, caught.value.faults))


def vectors(path: Path, **hints: Any) -> dict[str, Vector]:
    made = open_file(path, Hints(**hints)).made
    return {one.name: one.vector for one in made if isinstance(one, MadeVector)}


class TestPersonaVectors:
    def test_rows_are_ours_and_the_last_lies_after_the_final_norm(self, tmp_path: Path) -> None:
        path = persona_vector(tmp_path / "evil_response_avg_diff.pt")
        vector = one_vector(path)
        assert torch.equal(vector.values, matrix())
        assert vector.final_row == "post_norm"

    def test_another_name_has_to_be_explained(self, tmp_path: Path) -> None:
        path = persona_vector(tmp_path / "evil.pt")
        said = faults(path)
        assert "rows: embedding" in said
        assert f"a model of {LAYERS} layers" in said
        assert f"a model of {LAYERS + 1} layers" in said
        assert torch.equal(one_vector(path, Hints(rows="embedding")).values, matrix())

    def test_the_user_can_say_where_the_last_row_lies(self, tmp_path: Path) -> None:
        path = persona_vector(tmp_path / "evil_prompt_avg_diff.pt")
        assert one_vector(path, Hints(final_row="pre_norm")).final_row == "pre_norm"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.ones(3), r"got \[3\]"),
            (torch.ones(3, 4, dtype=torch.int64), "torch.int64"),
            (torch.tensor([[1.0, float("nan")]]), "not finite"),
        ],
    )
    def test_no_matrix_of_numbers(self, tmp_path: Path, content: object, message: str) -> None:
        path = save(tmp_path / "evil_response_avg_diff.pt", content)
        with pytest.raises(ConfigError, match=message):
            open_file(path)


class TestAssistantAxis:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda values: {"vector": values, "type": "pos_3", "role": "pirate"},
            lambda values: {"axis": values, "metadata": {"model": "m"}},
        ],
    )
    def test_row_i_is_layer_i_plus_one(self, tmp_path: Path, wrap: Any) -> None:
        blocks = matrix(LAYERS)
        vector = one_vector(save(tmp_path / "x.pt", wrap(blocks)))
        assert torch.equal(vector.values[1:], blocks)
        assert not vector.values[0].any()
        assert vector.final_row == "pre_norm"

    def test_the_index_rule(self, tmp_path: Path) -> None:
        """persona_vectors row l is assistant-axis row l - 1."""
        hidden_states = matrix()
        persona = one_vector(persona_vector(tmp_path / "t_response_avg_diff.pt", hidden_states))
        axis = one_vector(save(tmp_path / "axis.pt", hidden_states[1:]), Hints(rows="blocks"))
        assert torch.equal(persona.values[1:], axis.values[1:])

    def test_activations_become_means_and_their_difference(self, tmp_path: Path) -> None:
        rows = {f"{label}_p{i}_q{j}": matrix(LAYERS, seed=10 * i + j + 100 * (label == "neg"))
                for label in ("pos", "neg") for i in range(2) for j in range(3)}  # fmt: skip
        found = vectors(save(tmp_path / "evil.pt", rows))
        assert set(found) == {"evil_pos", "evil_neg", "evil_pos-neg"}
        by_hand = torch.stack([row for name, row in rows.items() if name.startswith("pos")]).double().mean(0)
        assert torch.equal(found["evil_pos"].values[1:], by_hand.float())
        difference = found["evil_pos"].values.double() - found["evil_neg"].values.double()
        assert torch.allclose(found["evil_pos-neg"].values.double(), difference, atol=1e-6)  # rounded once, not thrice

    def test_activations_of_different_shapes_and_bad_keys_are_told_together(self, tmp_path: Path) -> None:
        content = {"pos_p0_q0": matrix(4), "pos_p0_q1": matrix(3), "odd": matrix(4)}
        said = faults(save(tmp_path / "a.pt", content))
        assert "different shapes" in said
        assert "odd" in said

    def test_capping_experiments_become_vectors_with_rows_at_their_layers(self, tmp_path: Path) -> None:
        content = {
            "vectors": {f"layer_{i}/c": {"layer": i, "vector": matrix(1, seed=i)[0]} for i in range(LAYERS)},
            "experiments": [
                {"id": "layers_1:3-p0.1", "interventions": [{"vector": f"layer_{i}/c", "cap": 1.5} for i in (1, 2)]}
            ],
        }
        path = save(tmp_path / "caps.pt", content)
        assert "--num-layers" in faults(path)
        imported = open_file(path, Hints(num_layers=LAYERS))
        (made,) = imported.made
        assert isinstance(made, MadeVector)
        assert torch.equal(made.vector.values[2], matrix(1, seed=1)[0])
        assert torch.equal(made.vector.values[3], matrix(1, seed=2)[0])
        assert not made.vector.values[[0, 1, 4]].any()
        assert made.vector.final_row == "absent"
        assert "layer 2 at most 1.5, layer 3 at most 1.5" in imported.convention[1]

    def test_faults_of_a_capping_config_are_told_together(self, tmp_path: Path) -> None:
        content = {
            "vectors": {"a": {"layer": 9, "vector": matrix(1)[0]}, "b": {"layer": 1}},
            "experiments": [{"id": "x", "interventions": [{"vector": "nope", "cap": 1}]}, {"id": "y"}],
        }
        said = faults(save(tmp_path / "caps.pt", content), num_layers=LAYERS)
        for part in ("block 9", "vectors.b", "'nope'", "experiments[1]"):
            assert part in said


class TestByBlock:
    def test_steering_vectors(self, tmp_path: Path) -> None:
        path = save(tmp_path / "v.pt", {1: matrix(1, seed=1)[0], 2: matrix(1, seed=2)[0]})
        assert "--num-layers" in faults(path)
        assert "blocks 1 to 2" in faults(path, num_layers=2)
        vector = one_vector(path, Hints(num_layers=LAYERS))
        assert torch.equal(vector.values[3], matrix(1, seed=2)[0])
        assert not vector.values[[0, 1, 4]].any()
        assert vector.final_row == "absent"

    def test_repeng(self, tmp_path: Path) -> None:
        rows = {block: matrix(1, seed=block)[0] for block in (1, 2, 3)}
        path = repeng_gguf(tmp_path / "v.gguf", rows)
        assert "--num-layers" in faults(path)
        vector = one_vector(path, Hints(num_layers=LAYERS))
        for block, row in rows.items():
            assert torch.equal(vector.values[block + 1], row)
        assert vector.final_row == "post_norm"
        assert one_vector(path, Hints(num_layers=LAYERS, final_row="pre_norm")).final_row == "pre_norm"
        assert one_vector(path, Hints(num_layers=LAYERS + 1)).final_row == "absent"

    def test_damaged_and_other_gguf_files(self, tmp_path: Path) -> None:
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF" + b"\0" * 40)
        assert "not a GGUF file" in faults(broken)
        odd = repeng_gguf(tmp_path / "odd.gguf", {0: torch.tensor([float("inf"), 1.0])})
        assert "finite" in faults(odd, num_layers=LAYERS)


class TestWriting:
    vector = Vector(matrix(), "pre_norm", "m", "r")

    def write(self, path: Path) -> Path:
        path.write_bytes(WRITERS[path.suffix](self.vector))
        return path

    def test_pt_there_and_back_is_equal_to_the_bit(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a_response_avg_diff.pt")
        loaded = torch.load(path, weights_only=True)  # as persona_vectors loads it
        assert torch.equal(loaded, self.vector.values)
        assert loaded.dtype == torch.float32
        back = one_vector(path, Hints(final_row="pre_norm"))
        assert (back.values.numpy().tobytes(), back.final_row) == (self.vector.values.numpy().tobytes(), "pre_norm")

    def test_gguf_there_and_back_is_equal_to_the_bit(self, tmp_path: Path) -> None:
        back = one_vector(self.write(tmp_path / "a.gguf"))  # ours says layers and final norm itself
        assert back.values[1:].numpy().tobytes() == self.vector.values[1:].numpy().tobytes()
        assert back.final_row == "pre_norm"
        again = tmp_path / "b.gguf"
        again.write_bytes(WRITERS[".gguf"](back))
        assert one_vector(again).to_bytes() == back.to_bytes()

    def test_gguf_is_as_repeng_names_it(self, tmp_path: Path) -> None:
        from gguf import GGUFReader

        reader = GGUFReader(str(self.write(tmp_path / "a.gguf")))
        assert [tensor.name for tensor in reader.tensors] == [f"direction.{block}" for block in range(LAYERS)]
        assert reader.fields["general.architecture"].contents() == "controlvector"
        assert torch.equal(torch.from_numpy(reader.tensors[1].data.copy()), self.vector.values[2])

    def test_a_vector_without_any_row_is_not_written(self) -> None:
        with pytest.raises(ConfigError, match="all of its rows are zero"):
            WRITERS[".gguf"](Vector(torch.zeros(3, 4), "absent", "", ""))


class _Hostile:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return (os.system, (self.command,))


class TestHostileFiles:
    @pytest.mark.parametrize("is_zip", [True, False])
    def test_a_pickle_that_runs_a_program_is_refused_and_not_run(self, tmp_path: Path, is_zip: bool) -> None:
        proof = tmp_path / "it_ran"
        path = tmp_path / "evil_response_avg_diff.pt"
        content = {"vector": _Hostile(f"touch {proof}")}
        if is_zip:
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content, protocol=2))
        message = faults(path)
        assert not proof.exists()
        assert "system" in message
        assert "it was not run" in message
        assert "weights_only" not in message  # torch's advice is to turn the protection off
        torch.load(path, weights_only=False) if is_zip else pickle.loads(path.read_bytes())
        assert proof.exists(), "the pickle was hostile indeed"

    def test_another_pickle_is_refused_too(self, tmp_path: Path) -> None:
        path = tmp_path / "a.pt"
        path.write_bytes(pickle.dumps({"vector": [1.0]}, protocol=4))
        assert "it was not run" in faults(path)

    @pytest.mark.parametrize("content", [b"", b"nothing of torch", b"PK\x03\x04torn"])
    def test_what_is_no_file_of_torch(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.pt"
        path.write_bytes(content)
        assert str(path) in faults(path)

    def test_no_such_file(self, tmp_path: Path) -> None:
        assert "cannot be read" in faults(tmp_path / "a.pt")


def test_a_hint_that_says_nothing_about_the_file_is_a_fault(tmp_path: Path) -> None:
    path = persona_vector(tmp_path / "evil_response_avg_diff.pt")
    said = faults(path, num_layers=LAYERS, questions=Path("q.jsonl"))
    assert "--num-layers says nothing" in said
    assert "--questions says nothing" in said


def test_what_is_not_known_is_told_with_what_is(tmp_path: Path) -> None:
    said = faults(save(tmp_path / "a.pt", {"weights": torch.ones(2), "bias": torch.ones(HIDDEN)}))
    assert "keys weights, bias" in said
    assert "persona_vectors" in said
    assert ".csv" not in said  # of files with this ending alone
    other = tmp_path / "a.xyz"
    other.touch()
    assert ".csv" in faults(other)
