"""What follows the pages: blocks are found, outputs compared, and a wrong page is noticed."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

from tests.docs.blocks import Block, read_blocks
from tests.docs.outputs import missing, stable
from tests.docs.pages import PROJECT, Checkout

PAGE = """\
Text.

```bash
echo 3
```

```text
3
```

- In a list:

    ```yaml title="a/b.yaml"
    x: 1
    ```

````text
``` inside
````
"""


def _blocks(tmp_path: Path, text: str) -> list[Block]:
    (tmp_path / "page.md").write_text(text)
    return read_blocks(tmp_path / "page.md", "page.md")


def _block(language: str, text: str, title: str | None = None) -> Block:
    return Block("page.md", 1, language, title, text)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout.make(tmp_path / "checkout", "echo")


class TestBlocks:
    def test_are_found_in_order(self, tmp_path: Path) -> None:
        command, in_a_list, text = _blocks(tmp_path, PAGE)
        assert (command.language, command.text, command.shown, command.line) == ("bash", "echo 3\n", "3\n", 3)
        assert (in_a_list.language, in_a_list.title, in_a_list.text) == ("yaml", "a/b.yaml", "x: 1\n")
        assert (text.language, text.text) == ("text", "``` inside\n")

    def test_text_after_other_text_is_no_output(self, tmp_path: Path) -> None:
        command, text = _blocks(tmp_path, "```bash\ntrue\n```\nand\n```text\n3\n```\n")
        assert command.shown is None
        assert text.text == "3\n"

    def test_a_fence_that_never_ends_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(IndexError):
            _blocks(tmp_path, "```bash\ntrue\n")


class TestOutputs:
    def test_numbers_ids_and_lines_do_not_count(self) -> None:
        assert stable("none  0.79 ± 0.06\n──────\n\n 114084f0f419 done in 3m04s") == ["none # ± #", "# done in #"]
        assert missing("a 1.5 x1.5", "a  2e-3 x1.5") is None

    @pytest.mark.parametrize(
        ("shown", "printed", "line"),
        [
            ("a\nb", "a\nb", None),
            ("a\n…\nc", "a\nx\ny\nc", None),
            ("…\nc", "a\nc", None),
            ("a\n…", "a\nb", None),
            ("at …/results", "at /home/me/results", None),
            ("a\nc", "a\nb\nc", "c"),
            ("a\nb", "a", "b"),
            ("a", "a\nb", "(nothing, where it prints 'b')"),
            ("b\na", "a\nb", "b"),
            ("x1.5", "x15", "x1.5"),
        ],
    )
    def test_missing(self, shown: str, printed: str, line: str | None) -> None:
        assert missing(shown, printed) == line


class TestCheckout:
    def test_commands_share_files_and_find_shiftgrad(self, checkout: Checkout) -> None:
        checkout.follow(_block("bash", "echo hello > made.txt\n"))
        assert checkout.follow(_block("bash", "cat made.txt; .venv/bin/shiftgrad plan 'a b' | tr a-z A-Z\n")) == (
            "hello\nSHIFTGRAD PLAN A B\n"
        )

    @pytest.mark.parametrize("text", ["false; true\n", "false | true\n", "echo $not_there\n", "nothing_of_that_name\n"])
    def test_a_command_that_fails_is_noticed(self, checkout: Checkout, text: str) -> None:
        with pytest.raises(AssertionError, match="ended with status"):
            checkout.follow(_block("bash", text))

    @pytest.mark.parametrize("text", ["pip install x\n", "cd x; python -m pip list\n", "make install\n", "sudo ls\n"])
    def test_what_changes_the_machine_is_never_run(self, checkout: Checkout, text: str) -> None:
        with pytest.raises(AssertionError, match="list it in NOT_RUN"):
            checkout.follow(_block("bash", text))

    def test_a_command_that_never_ends_is_noticed(self, checkout: Checkout) -> None:
        with pytest.raises(subprocess.TimeoutExpired):
            replace(checkout, timeout_s=0.5).follow(_block("bash", "sleep 600\n"))

    def test_python_blocks_share_names_and_print_the_last_expression(self, checkout: Checkout) -> None:
        assert checkout.follow(_block("python", "x = 2\n")) == ""
        assert checkout.follow(_block("python", "print('two')\nx * 3\n")) == "two\n6\n"

    def test_a_test_on_a_page_runs(self, checkout: Checkout) -> None:
        with pytest.raises(AssertionError):
            checkout.follow(_block("python", "def test_it():\n    assert 1 == 2\n"))

    @pytest.mark.parametrize(
        "text",
        [
            "training: {epoch: 3}\n",
            "- defense: {kind: pps, vector: bridge}\n",
            "name: x\nruns: [{defense: none}]\n",
            "axes: {seed: [0, 1]}\n",
        ],
    )
    def test_a_wrong_sweep_file_is_noticed(self, checkout: Checkout, text: str) -> None:
        with pytest.raises(AssertionError, match=r"page\.md:1"):
            checkout.follow(_block("yaml", text))

    def test_parts_of_a_sweep_file(self, checkout: Checkout) -> None:
        checkout.follow(_block("yaml", "axes: {seed: {grid: [0, 1]}}\n"))
        checkout.follow(_block("yaml", "- defense: none\n- defense: {kind: inoculation, prompts: bridge}\n"))
        checkout.follow(_block("yaml", "defense: {kind: inoculation, prompts: bridge}\nlabel: asked\n"))

    def test_a_titled_block_is_written(self, checkout: Checkout) -> None:
        checkout.follow(_block("jsonl", '{"a": 1}\n{"b": 2}\n', title="data/rows.jsonl"))
        assert (checkout.folder / "data" / "rows.jsonl").read_text() == '{"a": 1}\n{"b": 2}\n'
        with pytest.raises(ValueError, match="delimiter"):
            checkout.follow(_block("jsonl", '{"a" 1}\n', title="data/rows.jsonl"))


def test_links_of_the_first_page_lead_somewhere() -> None:
    """The other pages' links are checked when the site is built (make check)."""
    text = (PROJECT / "README.md").read_text()
    links = re.findall(r"\]\(([^)\s:#]+)(?:#([^)\s]+))?\)", text)
    assert len(links) > 10
    for path, anchor in links:
        assert (PROJECT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", (PROJECT / path).read_text(), re.MULTILINE)
            assert anchor in {slugify(heading.replace("`", ""), "-") for heading in headings}, f"{path}#{anchor}"


def test_pages_are_followed_with_this_interpreter(checkout: Checkout) -> None:
    printed = checkout.follow(
        _block("bash", "source .venv/bin/activate\npython -c 'import sys; print(sys.executable)'\n")
    )
    assert Path(printed.strip()) == Path(sys.executable)
