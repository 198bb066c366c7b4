"""How the runs of a sweep are served: the command for vLLM, a base with the adapters of its runs by their ids."""

from __future__ import annotations

import shlex

from analysis.manifest import RunEntry, adapter_key
from analysis.remote import has_directory
from analysis.results import Results
from trainables.errors import ConfigError, Fault

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


def vllm_commands(results: Results) -> list[str]:
    """One command per base. Runs that are not trained yet are left out, and so are those whose adapter stands on a base
    with other adapters merged into it (``merged_runs``); raises ConfigError if none is left.

    ``--generation-config vllm``: else the server would apply the model's own top-p and penalties, which shape the
    distribution beside the temperature.
    """
    commands = []
    for base in [entry for entry in results.manifest.runs if entry.kind == "base"]:
        runs = {
            entry.run_id: entry
            for entry in results.manifest.runs
            if entry.kind == "run"
            and not entry.merged
            and has_directory(results.location / adapter_key(entry.run_id))
            and _base(entry) == _base(base)
        }
        if not runs:
            continue
        rank = max(int(entry.config["training.lora.rank"] or 0) for entry in runs.values())
        fits = next((one for one in VLLM_RANKS if one >= rank), rank)
        modules = [f"{run_id}={results.root / adapter_key(run_id)}" for run_id in runs]
        arguments = ["vllm", "serve", str(base.config["base.model"])]
        revision = base.config.get("base.revision")
        if revision and "/" in str(base.config["base.model"]) and len(str(revision)) == 40:
            arguments += ["--revision", str(revision)]
        arguments += ["--served-model-name", base.run_id, "--dtype", str(base.config["base.dtype"])]
        arguments += ["--generation-config", "vllm", "--enable-lora", "--max-lora-rank", str(fits)]
        command = shlex.join([*arguments, "--lora-modules", *modules])
        if command not in commands:
            commands.append(command)
    if not commands:
        message = "no run of this sweep is trained yet; `shiftgrad run` trains them, also while no server is there"
        raise ConfigError([Fault(results.name, merged_runs(results) or message)], "nothing can be served")
    return commands


def merged_runs(results: Results) -> str | None:
    """Which trained runs cannot be served beside the others, and what they need; None if there are none."""
    labels = [
        repr(entry.label)
        for entry in results.manifest.runs
        if entry.merged and has_directory(results.location / adapter_key(entry.run_id))
    ]
    if not labels:
        return None
    return (
        f"left out: {', '.join(labels)}. Their adapters belong on the base with the adapters of earlier runs merged "
        "into it. For a server of its own write the whole model: "
        "results.load_model(RUN)[0].merge_and_unload().save_pretrained(FOLDER)"
    )


def _base(entry: RunEntry) -> tuple[object, ...]:
    return tuple(entry.config.get(f"base.{name}") for name in ("model", "revision", "dtype"))
