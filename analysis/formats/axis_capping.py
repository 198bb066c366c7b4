"""Capping configs of assistant-axis: named vectors of single layers, and experiments that cap some of them.

``{"vectors": {name: {"layer": block, "vector": [hidden]}}, "experiments": [{"id", "interventions": [{"vector": name,
"cap": float}]}]}``. Every experiment becomes a vector with a row at each of its layers; the caps, which are one-sided
ceilings there, are said and not stored: a vector has none.
"""

from __future__ import annotations

from typing import Any

import torch

from analysis.formats.base import Foreign, Format, Hints, Imported, MadeVector, raise_faults
from analysis.formats.rows import FINAL_ROW_WORDS, of_blocks
from trainables.errors import Fault


class AxisCapping(Format):
    name = "axis-capping"
    what = "a capping config of assistant-axis (.pt: {vectors, experiments})"
    hints = frozenset({"num_layers", "final_row"})

    def recognises(self, file: Foreign, hints: Hints) -> bool:
        del hints
        return (
            file.suffix == ".pt" and isinstance(file.tensors, dict) and {"vectors", "experiments"} <= set(file.tensors)
        )

    def read(self, file: Foreign, hints: Hints) -> Imported:
        faults: list[Fault] = []
        rows = self._rows(file, faults)
        experiments = self._experiments(file, rows, faults)
        if hints.num_layers is None:
            faults.append(file.fault(f"does not say how many layers the model has; give {Hints.flag('num_layers')}"))
        else:
            faults += [
                file.fault(f"block {block} does not exist in a model of {hints.num_layers} layers", f"vectors.{name}")
                for name, (block, _) in rows.items()
                if block >= hints.num_layers
            ]
        raise_faults(faults)
        assert hints.num_layers is not None
        made, lines = [], ["a layer there is a block: our layer is one more; every experiment makes a vector"]
        for name, interventions in experiments.items():
            blocks = {rows[vector][0]: rows[vector][1] for vector, _ in interventions}
            vector = of_blocks(blocks, hints.num_layers, hints.final_row or "pre_norm")
            made.append(MadeVector(f"{file.name}_{name}".replace(":", "-"), vector))
            caps = ", ".join(f"layer {rows[vector][0] + 1} at most {cap:g}" for vector, cap in interventions)
            lines.append(f"{name}: {caps} ({FINAL_ROW_WORDS[made[-1].vector.final_row]})")
        return Imported(self.name, tuple(made), tuple(lines))

    @staticmethod
    def _rows(file: Foreign, faults: list[Fault]) -> dict[str, tuple[int, torch.Tensor]]:
        rows: dict[str, tuple[int, torch.Tensor]] = {}
        vectors = file.tensors["vectors"]
        for name, one in vectors.items() if isinstance(vectors, dict) else ():
            block, vector = (one.get("layer"), one.get("vector")) if isinstance(one, dict) else (None, None)
            is_block = isinstance(block, int) and not isinstance(block, bool) and block >= 0
            if (
                is_block
                and isinstance(vector, torch.Tensor)
                and vector.ndim == 1
                and bool(torch.isfinite(vector).all())
            ):
                rows[str(name)] = (int(block or 0), vector)
            else:
                faults.append(
                    file.fault("must be {layer: block, vector: [hidden] of finite numbers}", f"vectors.{name}")
                )
        if len({vector.shape for _, vector in rows.values()}) > 1:
            faults.append(file.fault("the vectors have different sizes", "vectors"))
        if not rows and not faults:
            faults.append(file.fault("holds no vector", "vectors"))
        return rows

    @staticmethod
    def _experiments(
        file: Foreign, rows: dict[str, tuple[int, torch.Tensor]], faults: list[Fault]
    ) -> dict[str, list[tuple[str, float]]]:
        experiments: dict[str, list[tuple[str, float]]] = {}
        raw: Any = file.tensors["experiments"]
        for index, one in enumerate(raw if isinstance(raw, list) else ()):
            key = f"experiments[{index}]"
            interventions = one.get("interventions") if isinstance(one, dict) else None
            if not isinstance(interventions, list) or not interventions or "id" not in one:
                faults.append(file.fault("must be {id, interventions: [{vector, cap}]}", key))
                continue
            found: list[tuple[str, float]] = []
            for place, item in enumerate(interventions):
                vector, cap = (item.get("vector"), item.get("cap")) if isinstance(item, dict) else (None, None)
                if str(vector) not in rows or not isinstance(cap, int | float):
                    message = f"must be {{vector: one of the vectors, cap: number}}; got {vector!r}, {cap!r}"
                    faults.append(file.fault(message, f"{key}.interventions[{place}]"))
                else:
                    found.append((str(vector), float(cap)))
            blocks = [rows[vector][0] for vector, _ in found]
            if len(set(blocks)) < len(blocks):
                faults.append(file.fault("caps two vectors at one layer, which one vector of ours cannot hold", key))
            experiments[str(one["id"])] = found
        if not experiments and not faults:
            faults.append(file.fault("holds no experiment", "experiments"))
        return experiments
