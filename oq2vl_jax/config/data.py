"""Training data, and how its text is written out."""

from dataclasses import dataclass, field
from typing import Literal

from oq2vl_jax.bounds import Length, Positive, Seed, SmallCount, Workers, WorkersOrZero
from oq2vl_jax.config.roles import OPERATIONAL

Template = Literal["plain", "open_qwen2vl", "open_qwen2vl_released", "chatml"]
"""Template of the text around images and turns; see data/text/templates.py."""
PromptForm = Literal["training", "published"]
"""training: the question has the form of the training documents of its template. published: the form of the published
code, which ends without the last line break, drops the token after every image and begins with <s> twice (open_qwen2vl
only)."""


@dataclass(frozen=True)
class OnlineConfig:
    """Packing while training (data/loading/online.py); one process only."""

    images: str | None = None
    """Folder of the pictures that instruction files name."""
    tokenizer: str | None = None
    """Hugging Face tokenizer folder."""
    window: SmallCount = 512
    """Documents packed together; more documents fill rows better, and all are read again on a restart."""
    columns: tuple[str, ...] = ()
    """Columns of parquet files, such as image=jpg text=caption; without it the schema says."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Captioned shapes, made and packed under run_dir/data."""

    num_documents: SmallCount = 512


@dataclass(frozen=True)
class DataConfig:
    """Training data, and the budgets it was packed with (checked against each source's manifest)."""

    num_tokens: Length
    """Tokens in a packed row."""
    max_images: SmallCount
    """Image slots in a packed row."""
    kind: Literal["packed", "online", "synthetic"] = "packed"
    """packed: folders of oq2vl_jax.data.pack. online: tars or instruction files, packed while training. synthetic: rows
    that the run makes itself."""
    sources: tuple[str, ...] = field(default=(), metadata=OPERATIONAL)
    """Packed folders; for kind online, tars or instruction files."""
    weights: tuple[Positive, ...] = ()
    """Share of each source in the mixture; empty: equal shares."""
    template: Template = "open_qwen2vl"
    """Template of the packed conversations; generation uses the same template."""
    attention_scope: Literal["document", "row"] = "document"
    """document: packed documents do not attend to each other, positions restart. row: they do, as published."""
    num_threads: Workers | None = field(default=None, metadata=OPERATIONAL)
    """Threads that decode images, per worker; None: one per core that this process may use."""
    num_workers: WorkersOrZero = field(default=0, metadata=OPERATIONAL)
    """Worker processes; 0 = threads only. Batches do not depend on either number."""
    exact_decoding: bool = False
    """Decode large JPEGs at full size before resizing, as the published code does. By default JPEG's own scaling
    halves them while decoding, as long as both sides stay at least the model's image size."""
    as_seen: bool = False
    """Turn pictures by their EXIF orientation and put transparent ones on white, as viewers show them and as generation
    reads them. The published code does neither; the packer's notes count such pictures."""
    verify: Literal["sample", "full"] = field(default="sample", metadata=OPERATIONAL)
    """Check of the packed files when a run starts. sample: size and both ends. full: every byte."""
    cache_dir: str | None = field(default=None, metadata=OPERATIONAL)
    """Local folder for copies of remote packed folders and checkpoints, shared by the runs of a machine; None:
    $OQ2VL_JAX_CACHE, or ~/.cache/oq2vl_jax."""
    cache_gib: Positive | None = field(default=None, metadata=OPERATIONAL)
    """What it may hold; what no run uses goes first. None: all but 2 % of the disk."""
    seed: Seed | None = None
    """Seed of the order of the rows, and of synthetic ones; None: the run's seed."""
    online: OnlineConfig = OnlineConfig()
    synthetic: SyntheticConfig = SyntheticConfig()

    def seed_of(self, run_seed: int) -> int:
        return run_seed if self.seed is None else self.seed

    def problems(self) -> list[str]:
        """Returns what a run cannot start with: settings that the kind needs, and settings of another kind."""
        problems = [
            f"data.{kind} is set, but data.kind is {self.kind}; set data.kind = {kind}, or leave it out"
            for kind, default in (("online", OnlineConfig()), ("synthetic", SyntheticConfig()))
            if kind != self.kind and getattr(self, kind) != default
        ]
        if self.kind == "synthetic" and self.sources:
            problems.append("data.kind = synthetic makes its own rows; leave data.sources out, or set data.kind")
        if self.kind != "synthetic" and not self.sources:
            problems.append("data.sources is empty")
        if self.kind == "online" and self.online.tokenizer is None:
            problems.append("data.kind = online needs data.online.tokenizer")
        if self.kind != "packed" and self.weights:
            problems.append(f"data.kind = {self.kind} mixes no data.weights")
        return problems
