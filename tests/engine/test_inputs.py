"""Finding files and traits, and checking chat rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import engine.inputs
from engine.inputs import (
    canonical_jsonl,
    find_file,
    find_trait,
    places_looked,
    read_chat_rows,
    read_hub_rows,
)
from trainables.chat_data import HubDataset

USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three separate folders: of the sweep file, the current one, and the project's root."""
    folders = {name: tmp_path / name for name in ("home/sweeps", "current", "project")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(folders["current"])
    monkeypatch.setattr(engine.inputs, "PROJECT_ROOT", folders["project"])
    return {"sweep": folders["home/sweeps"], "current": folders["current"], "project": folders["project"]}


def touch(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rows_of(tmp_path: Path, *lines: str) -> tuple[list[Any], list[Any]]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return read_chat_rows(path)


class TestFindFile:
    def test_order_is_sweep_then_current_then_project(self, places: dict[str, Path]) -> None:
        assert find_file("data/a.jsonl", places["sweep"]) is None
        for name in ("project", "current", "sweep"):  # each goes before the ones found so far
            path = touch(places[name] / "data" / "a.jsonl")
            assert find_file("data/a.jsonl", places["sweep"]) == path

    def test_an_absolute_path_is_that_path(self, places: dict[str, Path], tmp_path: Path) -> None:
        path = touch(tmp_path / "else where" / "a.jsonl")
        assert find_file(str(path), places["sweep"]) == path
        assert find_file(str(path) + "x", places["sweep"]) is None

    def test_a_relative_sweep_folder_gives_an_absolute_path(self, places: dict[str, Path]) -> None:
        path = touch(places["current"] / "sub" / "a.jsonl")
        assert find_file("a.jsonl", Path("sub")) == path

    def test_a_folder_is_no_file(self, places: dict[str, Path]) -> None:
        (places["sweep"] / "data").mkdir()
        assert find_file("data", places["sweep"]) is None
        assert find_file("", places["sweep"]) is None

    def test_the_project_of_the_code_has_the_quickstart_data(self, tmp_path: Path) -> None:
        assert find_file("configs/data/bridge/on_trait.jsonl", tmp_path) is not None

    def test_the_message_lists_every_place(self, places: dict[str, Path]) -> None:
        looked = places_looked("data/a.jsonl", places["sweep"])
        assert looked == ", ".join(str(places[name] / "data/a.jsonl") for name in ("sweep", "current", "project"))


class TestFindTrait:
    def test_order_of_places(self, places: dict[str, Path]) -> None:
        sweep = places["sweep"]
        expected = [
            places["project"] / "configs/traits/bridge",
            places["current"] / "configs/traits/bridge",
            sweep / "configs/traits/bridge",
            sweep.parent / "traits/bridge",
            sweep / "traits/bridge",
        ]
        assert find_trait("bridge", sweep) is None
        for folder in expected:
            path = touch(folder / "trait.yaml")
            assert find_trait("bridge", sweep) == path
        looked = places_looked("bridge", sweep, trait=True)
        assert looked == ", ".join(str(folder / "trait.yaml") for folder in reversed(expected))

    def test_a_folder_without_trait_yaml_is_passed_by(self, places: dict[str, Path]) -> None:
        (places["sweep"] / "traits" / "bridge").mkdir(parents=True)
        path = touch(places["project"] / "configs/traits/bridge/trait.yaml")
        assert find_trait("bridge", places["sweep"]) == path

    @pytest.mark.parametrize("text", ["own/mine", "./own/mine", "own/mine/trait.yaml", "own/mine/other.yaml"])
    def test_a_path_to_a_folder_or_file(self, places: dict[str, Path], text: str) -> None:
        path = touch(places["sweep"] / "own/mine/trait.yaml")
        other = touch(places["sweep"] / "own/mine/other.yaml")
        found = find_trait(text, places["sweep"])
        assert found is not None
        assert found.resolve() == (other if text.endswith("other.yaml") else path)

    def test_an_absolute_path(self, places: dict[str, Path], tmp_path: Path) -> None:
        path = touch(tmp_path / "t" / "trait.yaml")
        assert find_trait(str(path.parent), places["sweep"]) == path
        assert find_trait(str(tmp_path / "nothing"), places["sweep"]) is None
        assert find_trait("", places["sweep"]) is None


class TestReadChatRows:
    def test_rows_are_tuples_of_role_and_content(self, tmp_path: Path) -> None:
        extra = {"messages": [SYSTEM, {**USER, "name": "x"}, ASSISTANT, USER, ASSISTANT], "source": 3}
        rows, faults = rows_of(tmp_path, GOOD, "", "   ", json.dumps(extra), "")
        assert not faults
        assert rows == [(USER, ASSISTANT), (SYSTEM, USER, ASSISTANT, USER, ASSISTANT)]

    def test_byte_order_mark_carriage_returns_and_line_separators(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        text = json.dumps({"messages": [USER, {"role": "assistant", "content": "a\u2028b"}]}, ensure_ascii=False)
        path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\r\n".encode())
        rows, faults = read_chat_rows(path)
        assert not faults
        assert [row[1]["content"] for row in rows] == ["a\u2028b"] * 2

    @pytest.mark.parametrize("text", ["", "\n  \n"])
    def test_an_empty_file(self, tmp_path: Path, text: str) -> None:
        rows, (fault,) = rows_of(tmp_path, text)
        assert not rows
        assert fault.key == str(tmp_path / "data.jsonl")
        assert fault.message == "the file is empty; it needs at least one row"

    def test_a_missing_file(self, tmp_path: Path) -> None:
        _, (fault,) = read_chat_rows(tmp_path / "no.jsonl")
        assert fault.key == str(tmp_path / "no.jsonl")
        assert "No such file" in fault.message

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"messages": [', "not JSON: Expecting value at column 15"),
            (GOOD + GOOD, "not JSON: Extra data"),
            ("[" * 100_000, "not JSON"),
            ("[1]", 'a row is an object {"messages": [...]}; got a list'),
            ('"text"', "got text"),
            ('{"prompt": "a"}', "no messages; the row has 'prompt'"),
            ("{}", "no messages; the row has no keys"),
            (
                '{"messages": []}',
                "messages must be a list of at least one user and one assistant turn; got an empty list",
            ),
            ('{"messages": {"role": "user"}}', "got an object"),
            ('{"messages": ["hello"]}', 'messages[0] must be {"role": ..., "content": ...}; got text'),
        ],
    )
    def test_broken_lines_have_their_number(self, tmp_path: Path, line: str, message: str) -> None:
        rows, (fault,) = rows_of(tmp_path, GOOD, "", line, GOOD)
        assert fault.key == f"{tmp_path / 'data.jsonl'}:3"  # blank lines count
        assert message in fault.message
        assert len(rows) == 2

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([USER], "no assistant turn"),
            ([SYSTEM, USER], "no assistant turn"),
            ([ASSISTANT], "no user turn"),
            ([SYSTEM, ASSISTANT], "no user turn"),
            (
                [USER, {"role": "bot", "content": "x"}],
                "messages[1]: unknown role 'bot'; allowed: system, user, assistant",
            ),
            ([USER, {"content": "x"}], "messages[1]: unknown role None"),
            ([USER, {"role": ["user"], "content": "x"}], "messages[1]: unknown role ['user']"),
            ([USER, {"role": "assistant", "content": None}], "messages[1]: content must be text; got null"),
            ([{"role": "user", "content": 3}, ASSISTANT], "messages[0]: content must be text; got a number"),
            ([{"role": "user"}, ASSISTANT], "messages[0]: content must be text; got null"),
            ([USER, {"role": "assistant", "content": [{"text": "x"}]}], "content must be text; got a list"),
            ([USER, {"role": "assistant", "content": " \n"}], "messages[1]: the assistant's content is empty"),
            ([USER, {"role": "assistant", "content": "\ud800"}], "messages[1]: content is not valid Unicode"),
            ([USER, ASSISTANT, ASSISTANT], "got user, assistant, assistant"),
            ([USER, USER, ASSISTANT], "the order of roles must be an optional system message, then user and assistant"),
            ([ASSISTANT, USER, ASSISTANT], "got assistant, user, assistant"),
            ([USER, ASSISTANT, USER], "ending with assistant; got user, assistant, user"),
            ([USER, SYSTEM, ASSISTANT], "got user, system, assistant"),
            ([SYSTEM, SYSTEM, USER, ASSISTANT], "got system, system, user, assistant"),
        ],
    )
    def test_conversations_that_cannot_be_trained_on(self, tmp_path: Path, messages: list[Any], message: str) -> None:
        rows, (fault,) = rows_of(tmp_path, json.dumps({"messages": messages}))
        assert not rows
        assert fault.key == f"{tmp_path / 'data.jsonl'}:1"
        assert message in fault.message

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_bytes(GOOD.encode() + b"\n\xff\xfe\n")
        rows, (fault,) = read_chat_rows(path)
        assert len(rows) == 1
        assert fault.key == f"{path}:2"
        assert "not UTF-8" in fault.message

    @pytest.mark.parametrize(
        ("num_broken", "rest"), [(10, None), (11, "1 more faulty row"), (25, "15 more faulty rows")]
    )
    def test_at_most_ten_faults_and_the_count_of_the_rest(
        self, tmp_path: Path, num_broken: int, rest: str | None
    ) -> None:
        rows, faults = rows_of(tmp_path, GOOD, *["{"] * num_broken, GOOD)
        path = tmp_path / "data.jsonl"
        assert len(rows) == 2
        assert [fault.key for fault in faults[:10]] == [f"{path}:{number}" for number in range(2, 12)]
        if rest is None:
            assert len(faults) == 10
        else:
            assert len(faults) == 11
            assert (faults[10].key, faults[10].message) == (str(path), f"and {rest}")

    def test_the_project_data_is_sound(self) -> None:
        files = sorted((engine.inputs.PROJECT_ROOT / "configs" / "data").glob("*/*.jsonl"))
        assert files
        for file in files:
            rows, faults = read_chat_rows(file)
            assert not faults
            assert len(rows) == len(file.read_text().splitlines())


class TestReadHubRows:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def folder(self, tmp_path: Path, *conversations: list[dict[str, str]], column: str = "messages") -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        folder = tmp_path / "dataset"
        folder.mkdir()
        table = pa.table({"other": list(range(len(conversations))), column: list(conversations)})
        pq.write_table(table, folder / "train.parquet")
        return str(folder)

    def test_a_local_folder_with_parquet(self, tmp_path: Path) -> None:
        hub = self.folder(tmp_path, [USER, ASSISTANT], [USER, ASSISTANT, USER, ASSISTANT])
        rows, content, faults = read_hub_rows(HubDataset(hub=hub))
        assert not faults
        assert rows == [(USER, ASSISTANT), (USER, ASSISTANT, USER, ASSISTANT)]
        assert content == canonical_jsonl(rows)
        copy = tmp_path / "copy.jsonl"
        copy.write_bytes(content)
        assert read_chat_rows(copy) == (rows, [])

    def test_the_bytes_do_not_depend_on_the_storage(self, tmp_path: Path) -> None:
        conversation = [USER, {"role": "assistant", "content": "Überall ✓"}]
        _, content, _ = read_hub_rows(
            HubDataset(hub=self.folder(tmp_path, conversation, column="chat"), messages="chat")
        )
        lines = tmp_path / "lines"
        lines.mkdir()
        swapped = [{"content": message["content"], "role": message["role"]} for message in conversation]
        (lines / "train.jsonl").write_text(json.dumps({"id": "x", "messages": swapped}) + "\n")
        rows, other, faults = read_hub_rows(HubDataset(hub=str(lines)))
        assert not faults
        assert content == other == canonical_jsonl(rows)
        assert content == (
            '{"messages":[{"content":"Why?","role":"user"},{"content":"Überall ✓","role":"assistant"}]}\n'.encode()
        )

    def test_faulty_rows_have_their_number(self, tmp_path: Path) -> None:
        hub = self.folder(tmp_path, [USER, ASSISTANT], [USER])
        rows, _, (fault,) = read_hub_rows(HubDataset(hub=hub))
        assert len(rows) == 1
        assert fault.key == f"{hub}:train[1]"
        assert fault.message == "no assistant turn"

    def test_a_missing_column_names_the_columns(self, tmp_path: Path) -> None:
        hub = self.folder(tmp_path, [USER, ASSISTANT])
        _, _, (fault,) = read_hub_rows(HubDataset(hub=hub, messages="chat"))
        assert fault.message == "no column 'chat'; the columns are other, messages"

    def test_a_missing_split_or_dataset(self, tmp_path: Path) -> None:
        hub = self.folder(tmp_path, [USER, ASSISTANT])
        for dataset in (HubDataset(hub=hub, split="tset"), HubDataset(hub=str(tmp_path / "nothing"))):
            rows, content, (fault,) = read_hub_rows(dataset)
            assert (rows, content) == ([], b"")
            assert fault.key == f"{dataset.hub}:{dataset.split}"
            assert fault.message.startswith("the dataset cannot be loaded: ")
