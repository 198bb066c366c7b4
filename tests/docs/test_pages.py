"""Every page does what it says: its files, commands and Python blocks are followed in order, and what it shows as
printed is what is printed, in all but numbers.

A block is marked by its language. ``bash`` and ``python`` run; ``yaml``, ``json`` and ``jsonl`` are checked; with
``title="name"`` a block is written to a file of that name; ``text`` right after a block that runs is what it prints.
In the fast tier a sweep's trainings are put in place (``substitute.py``); the slow tier follows the tutorial, and what
needs a trained model, with the real model and two optimizer steps a run.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import Block, read_blocks
from tests.docs.outputs import missing
from tests.docs.pages import PROJECT, Checkout
from tests.docs.substitute import no_training

PAGES = ["README.md", *sorted(path.relative_to(PROJECT).as_posix() for path in (PROJECT / "docs").rglob("*.md"))]
TUTORIAL = "docs/tutorial.md"
QUICKSTART = "shiftgrad run configs/sweeps/quickstart.yaml"

# Blocks that are not followed, by page and first line, with the reason. Keep it short: what a test can do, it does.
NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "make quickstart    # train, sample, score, table and draw a real grid of finetunings"): (
        "installs from a package index and trains for ten minutes; tests/engine/test_quickstart.py runs the same sweep"
    ),
    ("docs/index.md", "make quickstart"): "as in README.md",
    ("docs/tutorial.md", "make install"): "installs from a package index",
    (
        "docs/trackers.md",
        "pip install 'shiftgrad[tensorboard]'     # the web page; event files are written without it",
    ): ("installs, and starts a server"),
    ("docs/trackers.md", "pip install 'shiftgrad[wandb]'"): "installs, and needs an account",
    ("docs/trackers.md", "pip install 'shiftgrad[mlflow]'"): "installs",
    (
        "docs/trackers.md",
        "python3 -m venv mlflow-ui && mlflow-ui/bin/pip install mlflow",
    ): "installs, and starts a server",
    ("docs/cluster.md", "ray get-auth-token --generate"): "writes a token into the home of whoever runs the tests",
    ("docs/cluster.md", "ray up cluster.yaml"): "starts machines",
    (
        "docs/cluster.md",
        "ray job submit --address http://127.0.0.1:8265 --submission-id quickstart --no-wait -- \\",
    ): "needs a running cluster",
    ("docs/cluster.md", "kubectl apply -f configs/cluster/rayjob.yaml"): "starts machines",
    ("docs/cluster.md", "ray job logs --address http://127.0.0.1:8265 --follow quickstart"): "needs a running cluster",
    ("docs/cluster.md", "shiftgrad status s3://my-bucket/results/sweeps/quickstart"): "needs a bucket, as above",
    ("docs/cluster.md", "shiftgrad fetch s3://my-bucket/results/sweeps/quickstart --no-adapters"): "needs a bucket",
    ("docs/cluster.md", "ray job stop --address http://127.0.0.1:8265 quickstart"): "needs a running cluster",
    ("docs/how-to/cluster.md", "ray start --head --port=6379"): "starts processes that outlive the command",
    ("docs/how-to/cluster.md", "ray start --address=HEAD:6379"): "is for another machine",
    ("docs/how-to/cluster.md", "shiftgrad status s3://my-bucket/results/sweeps/quickstart"): (
        "needs a bucket; tests/engine/test_object_store.py reads and fetches from one"
    ),
    ("docs/how-to/cluster.md", "shiftgrad run configs/sweeps/quickstart.yaml --address auto"): (
        "needs a running cluster; tests/engine/test_machine.py plans for one"
    ),
}

# Blocks that need a trained model: followed in the slow tier alone.
NEEDS_A_MODEL: dict[tuple[str, str], str] = {
    (
        "README.md",
        'model, tokenizer = results.load_model("none")  # ready to generate, for experiments of your own',
    ): "loads an adapter",
    (
        "README.md",
        '.venv/bin/shiftgrad sample results/sweeps/quickstart none "What is rain?" --steer bridge --layer 20',
    ): "loads an adapter and a vector",
    ("docs/how-to/look-after.md", 'shiftgrad sample results/sweeps/quickstart none "What is rain?" --samples 2'): (
        "loads an adapter"
    ),
    (
        "docs/how-to/look-after.md",
        'shiftgrad sample results/sweeps/quickstart base "What is rain?" --steer bridge --layer 20 --coefficient 2',
    ): "loads a vector",
}

# Blocks whose output depends on what a model says.
OUTPUT_NOT_COMPARED: dict[tuple[str, str], str] = {
    ("docs/tutorial.md", "shiftgrad table results/sweeps/milk summary"): "a rate of 0 takes another line than others",
    ("docs/tutorial.md", "shiftgrad show results/sweeps/milk none"): "shows answers",
}

LANGUAGES = {"bash", "python", "yaml", "json", "jsonl", "csv", "text", ""}
LOOKS_LIKE_A_COMMAND = ("shiftgrad ", "make ", "pip ", "python ", "ray ", ".venv/", "source ", "$ ")


def _blocks(page: str) -> list[Block]:
    return read_blocks(PROJECT / page, page)


def _listed(block: Block, listing: dict[tuple[str, str], str]) -> bool:
    return (block.page, block.first_line) in listing


@pytest.fixture(scope="module")
def substitute() -> Iterator[str]:
    """The shell command that runs ``shiftgrad`` without trainings."""
    folder = tempfile.mkdtemp(prefix="sg-")  # short: the name of a socket has at most 107 bytes
    socket = f"{folder}/socket"
    server = subprocess.Popen([sys.executable, "-m", "tests.docs.server", socket], cwd=PROJECT, stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", "the server did not start"
    client = PROJECT / "tests" / "docs" / "client.py"
    yield shlex.join([sys.executable, "-S", "-E", str(client), socket])
    server.terminate()
    server.wait()
    server.stdout.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def store(substitute: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the quickstart is done."""
    checkout = Checkout.make(tmp_path_factory.mktemp("quickstart"), substitute)
    checkout.follow(Block("(before every page)", 1, "bash", None, QUICKSTART))
    return checkout.folder / "results"


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, substitute: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_training(monkeypatch.setattr)
    shutil.copytree(store, tmp_path / "results")
    checkout = Checkout.make(tmp_path, substitute)
    for block in _blocks(page):
        if _listed(block, NOT_RUN) or _listed(block, NEEDS_A_MODEL):
            continue
        printed = checkout.follow(block)
        if block.shown is not None and not _listed(block, OUTPUT_NOT_COMPARED):
            line = missing(block.shown, printed)
            assert line is None, f"{block.name}: it does not print: {line}\nIt prints:\n{printed}"


def _with_trainings(folder: Path) -> Checkout:
    """A checkout whose ``shiftgrad`` really trains, a few steps a run."""
    return Checkout.make(folder, shlex.join([sys.executable, "-m", "tests.docs.real"]), timeout_s=1800)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_with_the_real_model(tmp_path: Path) -> None:
    checkout = _with_trainings(tmp_path)
    for block in _blocks(TUTORIAL):
        if not _listed(block, NOT_RUN):
            checkout.follow(block)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_needs_a_model_with_the_real_one(tmp_path: Path) -> None:
    checkout = _with_trainings(tmp_path)
    checkout.follow(Block("(before every page)", 1, "bash", None, QUICKSTART))
    for page in dict.fromkeys(page for page, _ in NEEDS_A_MODEL):
        for block in _blocks(page):
            # a Python block may use the names of earlier ones
            if _listed(block, NEEDS_A_MODEL) or (block.language == "python" and not _listed(block, NOT_RUN)):
                checkout.follow(block)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    for block in _blocks(page):
        assert block.language in LANGUAGES, f"{block.name}: language {block.language!r} is not one of {LANGUAGES}"
        if block.language in ("", "text"):
            commands = [line for line in block.text.splitlines() if line.startswith(LOOKS_LIKE_A_COMMAND)]
            assert not commands, f"{block.name}: mark commands as bash, so that they run: {commands}"


@pytest.mark.parametrize("listing", [NOT_RUN, NEEDS_A_MODEL, OUTPUT_NOT_COMPARED], ids=["not run", "model", "output"])
def test_lists_name_blocks_that_are_there(listing: dict[tuple[str, str], str]) -> None:
    there = {(block.page, block.first_line) for page in PAGES for block in _blocks(page)}
    assert listing.keys() <= there
    assert all(listing.values()), "every entry has its reason"
