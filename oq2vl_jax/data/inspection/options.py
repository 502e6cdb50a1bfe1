"""The options of inspect; no heavy imports, so that --help is quick."""

from dataclasses import dataclass
from typing import Literal

import tyro

from oq2vl_jax.bounds import Count, Length, Seed, SmallCount
from oq2vl_jax.config import Template


@dataclass(frozen=True)
class InspectCommand:
    """Shows packed rows, or samples that are not packed yet, on an HTML page."""

    rows: tyro.conf.Positional[tuple[str, ...]]
    """A packed folder, or its rows-NNNNN.array_record; or tars, parquet and instruction files."""
    out: str = "rows.html"
    num_rows: Count = 8
    """Packed rows shown, drawn at random; the statistics count every row of the files."""
    seed: Seed = 0
    tokenizer: str | None = None
    """Samples: Hugging Face tokenizer folder."""
    num_samples: Count = 10_000
    """Samples: about as many are read, from parts of the files drawn at random."""
    all: bool = False
    """Samples: read every one."""
    shown: Count = 50
    """Samples: as many are drawn."""
    images: str | None = None
    """Samples: folder of the pictures that they name."""
    columns: tuple[str, ...] = ()
    """Samples: columns of parquet files, image=jpg text=caption."""
    num_tokens: Length = 4096
    """Samples: token budget of a row."""
    max_images: SmallCount = 28
    """Samples: image budget of a row."""
    visual_tokens: Length = 144
    """Samples: tokens per image."""
    template: Template = "open_qwen2vl"
    """Samples: template of conversations."""
    unmarked_images: Literal["first", "skip"] = "first"
    """Samples: as --unmarked-images of oq2vl_jax.data.pack."""
    long_documents: Literal["auto", "skip", "cut"] = "auto"
    """Samples: as --long-documents of oq2vl_jax.data.pack."""
    image_size: SmallCount = 384
    """Samples: side of the square that pictures are resized to, in pixels."""
    num_workers: SmallCount = 2
    """Samples: processes that read them."""
