"""Another source of samples: a CSV of pictures and captions. Save it as oq2vl_jax/data/samples/formats/csv_captions.py.

image,caption              python -m oq2vl_jax.data.pack --shards captions.csv --images FOLDER ...
cats/0.jpg,two cats
"""

import csv
import io
from collections.abc import Iterator

from oq2vl_jax import paths
from oq2vl_jax.data.samples.formats.format import Format, Reading
from oq2vl_jax.data.samples.shards import Sample
from oq2vl_jax.errors import UserError


def read(path: str, reading: Reading) -> Iterator[Sample]:
    if reading.images is None:
        raise UserError(f"{path}: give the folder of the pictures with --images.")
    for i, row in enumerate(csv.DictReader(io.StringIO(paths.read_text(path)))):
        try:
            with paths.open_input(paths.join(reading.images, row["image"])) as file:
                yield Sample(f"{i:09d}", [file.read()], text=row["caption"])
        except FileNotFoundError:
            yield Sample(f"{i:09d}", [], problem="image_missing")


FORMAT = Format(matches=lambda path: path.endswith(".csv"), read=read)
