"""How many rows of each source a run has read: which source a row comes from is a function of its number alone."""

import os
from typing import Any

from oq2vl_jax.config import DataConfig
from oq2vl_jax.data.packing.packed import PackedRows

MOST_COUNTED = 500_000
"""Rows counted one by one, at 20 microseconds each."""


def mix(sources: list[Any], data: DataConfig) -> Any:
    """Mixes Grain datasets in data.weights, evenly without them: over any 1,000 rows to within a row per source."""
    import grain

    return grain.MapDataset.mix(sources, weights=list(data.weights) or None) if len(sources) > 1 else sources[0]


class SourceCounts:
    """Counts rows and epochs by source, from the numbers of the rows."""

    def __init__(self, data: DataConfig):
        import grain

        self.names = short_names(data.sources)
        self._lengths = [len(PackedRows(path)) for path in data.sources]
        number = len(data.sources)
        self._source_of = mix([grain.MapDataset.source([i]).repeat() for i in range(number)], data)
        self._counts, self._counted = [0] * number, 0
        weights = data.weights or (1.0,) * number
        self._shares = [weight / sum(weights) for weight in weights]

    def up_to(self, num_rows: int) -> dict[str, float]:
        """Returns "rows/NAME" and "epochs/NAME" of each source over the first num_rows rows of a run."""
        if num_rows < self._counted:
            self._counts, self._counted = [0] * len(self._counts), 0
        if num_rows - self._counted > MOST_COUNTED:  # a run that goes on: to within a row, as `mix` keeps the weights
            self._counted = num_rows
            self._counts = [round(share * num_rows) for share in self._shares]
        for i in range(self._counted, num_rows):
            self._counts[self._source_of[i]] += 1
        self._counted = num_rows
        found: dict[str, float] = {}
        for name, count, length in zip(self.names, self._counts, self._lengths, strict=True):
            found |= {f"rows/{name}": count, f"epochs/{name}": count / length}
        return found


def short_names(paths: tuple[str, ...]) -> list[str]:
    """Returns the last folder of each path, with those before it that tell it apart, or a number if paths are equal."""
    parts = [os.path.normpath(path).split(os.sep) for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(part[-depth:]) for part in parts}) < len(
        {tuple(p) for p in parts}
    ):
        depth += 1
    names = ["/".join(part[-depth:]) for part in parts]
    return [f"{name}#{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]
