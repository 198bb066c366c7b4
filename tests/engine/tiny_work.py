"""Jobs of a tiny sweep done in this process, as a trial does them, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.prepare import Prepared
from engine.run import write_sweep
from engine.store import Store
from engine.work import SweepWork


def work_on(prepared: Prepared, store: Store, **how: Any) -> SweepWork:
    """The jobs of the sweep, in a store that it has been written to. ``how``: further fields of SweepWork."""
    return SweepWork(
        store=store,
        jobs=dict(prepared.jobs),
        device="cpu",
        threads=1,
        zero_stage=0,
        gradient_checkpointing=False,
        **how,
    )


def work_in(prepared: Prepared, folder: Path, **how: Any) -> SweepWork:
    """The jobs of the sweep, in a store at ``folder``, which is made if it is not there."""
    store = Store.open(folder, create=True)
    write_sweep(prepared, store)
    return work_on(prepared, store, **how)
