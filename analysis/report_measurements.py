"""What a report shows of the inside of models: figures of every measurement, and predictions beside outcomes.

A measurement gives blocks, each with a figure in two widths or a small table. Which blocks there are follows from the
tables that the measurement made, not from its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd

from analysis import measured_figures as figures
from analysis.cross_trait import cross_trait, cross_trait_gradients
from analysis.foretold import foretold, how_it_held, measurement_of, ranking
from analysis.manifest import MeasureEntry
from analysis.report_axes import axis_blocks
from analysis.report_blocks import MAX_LAYERS, Block, drawn_block, few_layers, interval, number
from analysis.report_capping import capping_blocks, drift_blocks, stability_blocks
from analysis.report_trainings import training_names
from analysis.results import Results
from analysis.rows import NO_CONDITION
from analysis.steering_strength import scores_by_coefficient, with_coefficients

WEIGHTS = "weight_steering"
"""A kind that has sections of its own (analysis/report_weights.py)."""


@dataclass(frozen=True)
class Section:
    """A measurement: what it read of which models, and what came of it."""

    name: str
    facts: str
    blocks: tuple[Block, ...]


def measurement_sections(results: Results) -> list[Section]:
    """One section per measurement of the sweep, in its order; without blocks where nothing is done yet."""
    sections = []
    predictions = foretold(results)
    for name in dict.fromkeys(entry.name for entry in results.manifest.measurements if entry.kind != WEIGHTS):
        entries = [entry for entry in results.manifest.measurements if entry.name == name]
        blocks = [block for entry in entries for block in _blocks(results, entry)]
        blocks += [*_compared(results, entries), *_steering_vectors(results, entries[0])]
        blocks += _predicted(name, predictions[predictions["measurement"] == name])
        sections.append(Section(name, _facts(results, entries), tuple(blocks)))
    capped = tuple(capping_blocks(results.capping()))
    if capped:
        sections.append(Section("capping", "what clamping activations while a model answers does", capped))
    return sections


def sweep_blocks(results: Results) -> list[Block]:
    """What is shown of all predictions of the sweep together: across traits, and how well they held."""
    predictions = foretold(results)
    return [*_crossed(results, predictions), *_held(predictions)]


def _crossed(results: Results, predictions: pd.DataFrame) -> Iterator[Block]:
    """Figure 5: every candidate on the data of every trait; nothing where the data is of one trait."""
    table = cross_trait(predictions)
    if table.empty:
        return
    axes = dict(zip(table["measurement"], zip(table["data"], table["trait"], strict=True), strict=True))
    read = "; ".join(f"{name}: {data}, along {trait}" for name, (data, trait) in axes.items())
    yield from drawn_block(
        "cross_trait_curves",
        "Across traits: the cosine over layers",
        f"Mean over rows of the gradient's cosine with the vector of the trait that the data teaches ({read}). A "
        "vector that lifts the curve is foreseen to keep that trait away, whichever trait it was made of.",
        partial(figures.cross_trait_curves, cross_trait_gradients(results)),
    )
    metrics = list(dict.fromkeys(table["metric"].dropna()))
    foreseen, found = "foreseen: shift", f"found: {', '.join(metrics)}"
    parts = [table.assign(panel=foreseen, value=table["shift"])]
    if table["score"].notna().any():
        parts.append(table.assign(panel=found, value=table["score"]))
    scales = {scale for run in results.manifest.runs for name, scale in run.scales.items() if name in metrics}
    yield from drawn_block(
        "cross_trait_matrix",
        "Across traits: foreseen and found",
        f"Each candidate (row) on each data ({read}). Shift: how much it raises the cosine of the gradient, mean over "
        "the layers read; above 0 less of the trait should be learnt. Found: the score of the runs trained with it, "
        "undefended ones on top; – is not known (yet).",
        partial(figures.cross_trait_matrix, pd.concat(parts), scales={found: scales.pop()} if len(scales) == 1 else {}),
    )


def _held(predictions: pd.DataFrame) -> Iterator[Block]:
    """How well all predictions held; nothing while no run has had a candidate as its defense."""
    held = how_it_held(predictions)
    if held.empty:
        return
    rows = []
    for row in held.to_dict("records"):
        rank = interval(row["rank_correlation"], row["rank_low"], row["rank_high"])
        pooled = interval(row["pooled_r"], row["pooled_low"], row["pooled_high"])
        numbers = (str(row["num_candidates"]), rank, number(row["rank_p"], ".3f"), pooled, number(row["auc"], ".2f"))
        rows.append((str(row["score"]), *numbers))
    yield Block(
        "held",
        "How well the predictions held",
        "Each score of a candidate against what its run then kept away (the metric of the undefended run minus that of "
        "the run), over all candidates of all data that have a run. Rank correlation is Spearman's, with a bootstrap "
        "interval over candidates and the p of a permutation test; AUC is the chance that a candidate that worked (its "
        "interval lies above 0) scores above one that did not. With few candidates nothing is certain.",
        head=("Score", "candidates", "rank correlation", "p", "pooled r", "AUC"),
        rows=tuple(rows),
    )


def _facts(results: Results, entries: Sequence[MeasureEntry]) -> str:
    frame = results.measurements()
    frame = frame[frame["measurement"] == entries[0].name]
    done, shards = int(frame["shards_done"].sum()), int(frame["num_shards"].sum())
    models = ", ".join(dict.fromkeys(entry.run for entry in entries))
    if "data" not in entries[0].config:  # a study
        text = f"{entries[0].kind}: nothing is read"
        return text if done == shards else f"{text}; {done} of {shards} shards are done"
    data = entries[0].config.get("data")
    text = f"{entries[0].kind} of {models}, on {data if isinstance(data, str) else 'a dataset'}"
    return text if done == shards else f"{text}; {done} of {shards} shards are done"


def _blocks(results: Results, entry: MeasureEntry) -> Iterator[Block]:
    """What is drawn for one model."""
    where = "" if entry.run == "base" else f", {entry.run}"
    stem = f"{entry.name}_{entry.run_id}"

    def table(name: str) -> pd.DataFrame:
        frame = results.measured(name)
        return frame[(frame["measurement"] == entry.name) & (frame["run_id"] == entry.run_id)]

    gradients = table("gradients")
    if len(gradients):
        vectors = list(dict.fromkeys(gradients["vector"]))
        layers = few_layers(gradients)
        trait = str(entry.config.get("trait") or vectors[0])
        yield from drawn_block(
            f"{stem}_cosine_scatter",
            f"Gradient cosine along {trait} with and without{where}",
            "A point per row of the data. Below 0 a step of gradient descent pushes activations along the vector. "
            "Right of the identity line the row pushes less along it with the defense; in the lower right quarter the "
            "sign flips.",
            partial(figures.cosine_scatter, gradients, vector=trait, layers=layers),
        )
        yield from drawn_block(
            f"{stem}_cosine_by_layer",
            f"Gradient cosine over layers{where}",
            "Mean over rows, with its standard error. A steering vector changes what is read below its layer through "
            "the backward pass and above it through the forward pass.",
            partial(figures.cosine_by_layer, gradients, vectors=vectors),
        )
    losses = table("losses")
    if len(set(losses["condition"])) > 1:
        yield from drawn_block(
            f"{stem}_loss_scatter",
            f"Loss with and without{where}",
            "A point per row, in nats per response token. Above the identity line the defense explains the row.",
            partial(figures.loss_scatter, losses),
        )
    if len(gradients) and len(losses):
        curves = with_coefficients(gradients, entry)
        if curves["coefficient"].nunique() > 2:  # nothing, and two more
            layer = layers[-1] if len(layers) < 2 else layers[1]
            scores = scores_by_coefficient(results, entry)
            beside = " and what runs with them scored" if len(scores) else ""
            yield from drawn_block(
                f"{stem}_coefficients",
                f"Loss and cosine over coefficients{beside}{where}",
                "Means over rows of the data with 95 % bands; a curve per way of steering."
                + (
                    " Last, the runs that were trained with that steering, coefficient 0 being the undefended run: "
                    "means over answers, with intervals over questions (and seeds, where there are several)."
                    if beside
                    else ""
                ),
                partial(
                    figures.coefficient_curves,
                    curves,
                    with_coefficients(losses, entry),
                    scores,
                    vector=trait,
                    layer=layer,
                ),
            )
    yield from _further(table, entry, stem, where)
    yield from axis_blocks(table("axis_summary"), table("axis_tests"), entry)  # a study is of no model
    yield from stability_blocks(table("cap_stability"), stem, where)


def _further(table: Callable[[str], pd.DataFrame], entry: MeasureEntry, stem: str, where: str) -> Iterator[Block]:
    """Blocks of the tables that few measurements make."""
    similarities = table("similarities")
    if len(similarities):
        reference = str(similarities["reference"].iloc[0])
        curves = with_coefficients(similarities, entry)
        read = sorted(set(similarities["layer"]))
        yield from drawn_block(
            f"{stem}_signature",
            f"Gradients under steering against that under {reference}{where}",
            "Mean over rows of the cosine of the two gradients, token by token, over the coefficient; a curve per "
            "layer that is read. Coefficient 0, where it is measured, is the model without anything: steering changes "
            "gradients as the other condition does where a curve rises above that.",
            partial(figures.signature, curves, layers=read),
        )
    components = table("components")
    if len(components):
        layers = sorted(set(components["layer"]))
        yield from drawn_block(
            f"{stem}_explained",
            f"Directions of the gradient's change{where}",
            "Share of the (uncentred) change of the gradient that each principal direction explains.",
            partial(figures.explained_variance, components, layers=layers[:MAX_LAYERS]),
        )
        for layer in layers[:MAX_LAYERS]:
            yield from drawn_block(
                f"{stem}_components_{layer}",
                f"What the directions are, layer {layer}{where}",
                "Cosine of the first directions, and of the mean change, with vectors.",
                partial(figures.component_cosines, components, layer=layer),
            )
    changes = table("activation_changes")
    if len(changes):
        for vector in dict.fromkeys(changes["vector"]):
            yield from drawn_block(
                f"{stem}_change_{vector}",
                f"One gradient step: activations along {vector}{where}",
                "dh is what one step on a row does to the row's own activations, read without the defense.",
                partial(figures.change_by_layer, changes, vector=vector),
            )
            yield from drawn_block(
                f"{stem}_change_scatter_{vector}",
                f"One gradient step with and without a defense, along {vector}{where}",
                "A point per row. Below the identity line the defended step moves activations less along the vector.",
                partial(figures.change_scatter, changes, vector=vector, layers=few_layers(changes)),
            )


def _compared(results: Results, entries: Sequence[MeasureEntry]) -> Iterator[Block]:
    """What is drawn of several models together: activations of runs beside those of the base, and drift."""
    drift = results.measured("drift")
    drift = drift[drift["measurement"] == entries[0].name]
    names = training_names(results.manifest.runs)
    drift = drift.assign(run=drift["run_id"].map(names).fillna(drift["run"]))
    yield from drift_blocks(drift, entries[0].name)
    projections = results.measured("projections")
    projections = projections[
        (projections["measurement"] == entries[0].name) & (projections["condition"] == NO_CONDITION)
    ]
    for base in (entry for entry in results.manifest.runs if entry.kind == "base"):
        labels = [entry.label for entry in results.manifest.runs if entry.is_over(base)]
        own = projections[projections["run"].isin([base.label, *labels])]
        if base.label not in set(own["run"]) or own["run"].nunique() < 2:
            continue
        where, stem = ("", "") if base.label == "base" else (f", {base.label}", f"_{base.run_id}")
        for vector in dict.fromkeys(own["vector"]):
            yield from drawn_block(
                f"{entries[0].name}_projections_{vector}{stem}",
                f"Activations of trained models along {vector}{where}",
                "Mean projection minus that of the base on the same rows, in units of the base's mean activation norm.",
                partial(figures.projection_by_layer, own, vector=vector, base=base.label),
            )


def _steering_vectors(results: Results, entry: MeasureEntry) -> Iterator[Block]:
    """How the vectors of a signature's conditions stand to all vectors of the sweep, layer by layer."""
    if entry.kind != "similarities":
        return
    made = {name: results.vector(name).values.double() for name in results.manifest.vectors if results.has_vector(name)}
    steered = dict.fromkeys(str(given["vector"]) for given in entry.config["conditions"] if "vector" in given)
    rows = [
        {
            "vector": f"{one} with {other}",
            "layer": layer,
            "cosine": float(row @ against / (row.norm() * against.norm())),
        }
        for one in steered
        for other in made
        if one in made and other != one
        for layer, (row, against) in enumerate(zip(made[one], made[other], strict=True))
        if layer and float(row.norm() * against.norm()) > 0
    ]
    if rows:
        yield from drawn_block(
            f"{entry.name}_vector_cosines",
            "The vectors that steer beside the others",
            "Cosine at every layer.",
            partial(figures.vector_cosines, pd.DataFrame(rows)),
        )


def _predicted(name: str, frame: pd.DataFrame) -> Iterator[Block]:
    """The ranking of candidates, beside what their runs showed where there are any."""
    if frame.empty:
        return
    ranked = ranking(frame)
    rows = tuple(
        (
            measurement_of(row["condition"], row["run"]),
            number(row["shift"], "+.4f"),
            f"{row['least_shift']:+.3f} to {row['greatest_shift']:+.3f}",
            number(row["loss_gap"], "+.3f"),
            number(row["projection_difference"], "+.2f"),
            interval(row["outcome"], row["outcome_low"], row["outcome_high"]),
        )
        for row in ranked.to_dict("records")
    )
    yield Block(
        f"{name}_ranking",
        f"Foreseen before training, along {ranked['trait'].iloc[0]}",
        "Shift: mean over layers of how much a candidate raises the cosine of the gradient with the trait's vector; "
        "above 0 the data pushes less along the trait, so less of it should be learnt. Loss gap: loss without minus "
        "with the candidate. Kept away: the metric of the undefended run minus that of the run with this defense, with "
        "its 95 % interval.",
        head=("Candidate", "shift", "over layers", "loss gap", "projection difference", "kept away"),
        rows=rows,
    )
    found = ranked.dropna(subset=["outcome"])
    if len(found):
        metric = str(frame["metric"].dropna().iloc[0])
        labels = {"shift": "foreseen: shift of the cosine", "outcome": f"found: {metric} kept away"}
        yield from drawn_block(
            f"{name}_foreseen_and_found",
            "Foreseen and found",
            "A point per candidate. Up and to the right: a shift was foreseen, and the run kept the trait away.",
            partial(
                figures.foreseen_and_found,
                found.drop(columns="data"),
                score="shift",
                outcome="outcome",
                labels=labels,
            ),
        )
