"""What stands in place of a name in a config: a trait's prompts as texts, a metric with its traits and models.

Faults go to ``Sources.faults`` under the user's own key.
"""

from __future__ import annotations

from analysis.judges import BaseMetric, MetricConfig
from analysis.judges.openai import OpenaiMetric
from engine.config_faults import nearest, show
from engine.sources import Sources
from trainables.errors import ConfigError, Fault


def prompt_bank(bank: object, key: str, sources: Sources) -> tuple[str, ...] | None:
    """The texts of a bank: those given, a trait's ``inoculation_prompts``, or those of a file. None: a fault."""
    if not isinstance(bank, str):
        assert isinstance(bank, tuple)
        return bank
    return sources.prompt_bank(bank, key)


def resolved_metric(metric: MetricConfig, key: str, sources: Sources) -> MetricConfig | None:
    """The metric with the contents of its traits and the revisions of its models. None: a fault."""
    assert isinstance(metric, BaseMetric)
    asking = metric.asking
    if isinstance(asking, OpenaiMetric) and asking.endpoint not in sources.endpoints:
        field = "endpoint" if asking is metric else "otherwise.endpoint"
        known = nearest(asking.endpoint, sources.endpoints)
        sources.faults.append(Fault(f"{key}.{field}", f"no endpoint {show(asking.endpoint)}; {known}"))
        return None
    traits = {name: sources.trait(name, f"{key}.{field}") for field, name in metric.trait_names().items()}
    bases = {field: sources.base(base, f"{key}.{field}".rstrip(".")) for field, base in metric.bases().items()}
    named = {name: found[0] for name, found in traits.items() if found is not None}
    models = {field: found[0] for field, found in bases.items() if found is not None}
    if len(named) < len(traits) or len(models) < len(bases):
        return None
    try:
        return metric.resolved(named, models)
    except ConfigError as error:
        sources.faults += [Fault(f"{key}.{fault.key}", fault.message) for fault in error.faults]
        return None
