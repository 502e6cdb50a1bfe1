"""A training run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from oq2vl_jax.bounds import (
    Below1,
    Count,
    CountOrRest,
    CountOrZero,
    Length,
    NotNegative,
    Positive,
    Rate,
    Seed,
    Share,
    SmallCount,
    Width,
)
from oq2vl_jax.config.data import DataConfig
from oq2vl_jax.config.model import ModelConfig
from oq2vl_jax.config.roles import OPERATIONAL

Part = Literal["vision", "projector", "decoder"]
"""Parts of the model, by their names in it."""
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True)
class OptimizerConfig:
    """The direction of a step; its size is the learning rate times the schedule (ScheduleConfig)."""

    learning_rate: Rate
    """Peak learning rate."""
    weight_decay: NotNegative
    """On matrices only. The published run's effective decay was 0 (its groups were built from flattened shards)."""
    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, as published. muon: Muon for the matrices of layers and projector, AdamW for embeddings, heads and vectors
    (arXiv 2502.16982); its updates have AdamW's size, so learning rates of AdamW are a start."""
    own: str | None = None
    """FILE.py:NAME of an optimizer in place of the kind: a function of this configuration (docs/extend.md)."""
    max_grad_norm: Positive = 1.0
    vision_learning_rate: Rate | None = None
    """Peak learning rate of the vision encoder; None: learning_rate."""
    projector_learning_rate: Rate | None = None
    decoder_learning_rate: Rate | None = None
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Share = 1e-8
    muon_momentum: Share = 0.95

    def problems(self) -> list[str]:
        """Returns settings of another kind, and a kind beside an optimizer of one's own."""
        problems = []
        if self.own is not None and self.kind != OptimizerConfig.kind:
            problems.append("optimizer.own replaces optimizer.kind; set one or the other")
        if self.muon_momentum != OptimizerConfig.muon_momentum and (self.kind != "muon" or self.own is not None):
            problems.append("optimizer.muon_momentum is set, but optimizer.kind is not muon")
        return problems


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run's steps: it rises linearly from 0, then takes the shape of its kind."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: falls as a cosine to 0. wsd (warm-up, stable, decay): stays at the peak, then falls linearly to 0.
    constant: stays at the peak, a trunk to branch decays from (--init-from RUN@STEP --init-optimizer)."""
    warmup_fraction: Share = 0.03
    """Share of the steps in which the rate rises."""
    decay_fraction: Share = 0.2
    """Share of the steps in which the rate of wsd falls. 1 without warm-up: the decay of a branch."""
    vision_warmup_fraction: Share | None = None
    """Warm-up of the vision encoder; None: warmup_fraction."""
    projector_warmup_fraction: Share | None = None
    decoder_warmup_fraction: Share | None = None
    own: str | None = None
    """FILE.py:NAME of a schedule in place of the kind: from (peak, warm-up steps, the TrainConfig) to a function of the
    step (docs/extend.md)."""

    def problems(self) -> list[str]:
        """Returns what a run cannot start with: fractions that overlap, and settings of another kind."""
        problems = []
        if self.own is not None and (self.kind, self.decay_fraction) != ("cosine", ScheduleConfig.decay_fraction):
            problems.append("schedule.own replaces schedule.kind and decay_fraction; set one or the other")
        if self.kind != "wsd" and self.decay_fraction != ScheduleConfig.decay_fraction:
            problems.append(
                f"schedule.decay_fraction is set, but schedule.kind is {self.kind}; set schedule.kind = wsd"
            )
        for name in ("warmup_fraction", *(f"{part}_warmup_fraction" for part in PARTS)):
            warmup = getattr(self, name)
            if self.kind == "wsd" and warmup is not None and warmup + self.decay_fraction > 1:
                problems.append(
                    f"schedule.{name} = {warmup} and schedule.decay_fraction = {self.decay_fraction} are more than the "
                    "whole run together"
                )
        return problems


@dataclass(frozen=True)
class LossConfig:
    """Terms beside the cross entropy, each a mean over all labelled tokens of the global batch. The held-out loss stays
    the cross entropy alone."""

    z_loss: NotNegative = 0.0
    """Weight of log(sum(exp(logits)))^2, which keeps the logits' scale in check (arXiv 2204.02311, section 5)."""
    label_smoothing: Below1 = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    own: str | None = None
    """FILE.py:NAME of a loss in place of train/loss.py and these terms (docs/extend.md)."""

    def problems(self) -> list[str]:
        if self.own is None or (self.z_loss, self.label_smoothing) == (0.0, 0.0):
            return []
        return ["loss.own replaces loss.z_loss and loss.label_smoothing; set one or the other"]


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the trained weights, kept and evaluated beside them."""

    decay: Below1 | None = None
    """Share of the average that a step keeps, such as 0.999; None: no average. In step t it is at most (1 + t) / (10 +
    t), as in TensorFlow's ExponentialMovingAverage, so that the average forgets the initial weights of a short run."""


@dataclass(frozen=True)
class TrainableConfig:
    """Parts that are trained. Published stages: pretrain and finetune = projector + decoder; full-pretrain = all."""

    vision: bool = False
    projector: bool = True
    decoder: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of linear layers (model/adapters.py). With a rank, they alone are trained: all of init_from is
    frozen, `targets` counts in place of `trainable`, and checkpoints hold the adapters and the digest of init_from."""

    rank: Width | None = None
    """Inner width of an adapter; None: no adapters."""
    alpha: Positive = 32.0
    """The adapter's share of the output is alpha / rank."""
    targets: tuple[Part, ...] = ("decoder",)
    """Parts whose linear layers get adapters."""
    kind: str = "lora"

    def problems(self) -> list[str]:
        problems = []
        if self.kind != "lora":
            problems.append(f"lora.kind = {self.kind} is not here; lora is (no DoRA, no quantised base)")
        if self.rank is not None and (not self.targets or len(set(self.targets)) < len(self.targets)):
            problems.append("lora.targets names no part, or one twice")
        if self.rank is None and self != LoraConfig():
            problems.append("lora.alpha, targets or kind is set, but lora.rank is not")
        return problems


@dataclass(frozen=True)
class MeshConfig:
    """Device mesh (data, fsdp): rows are split over both, parameters and optimizer state over fsdp. -1: the rest."""

    data: CountOrRest = 1
    fsdp: CountOrRest = -1
    sharding: Literal["zero1", "fsdp"] = "zero1"
    """zero1: weights are gathered and gradients reduced once per step. fsdp: layer by layer, for larger decoders."""


@dataclass(frozen=True)
class CheckpointConfig:
    every_num_steps: Count = 500
    keep: Count = 2
    staging_dir: str | None = None
    """Local folder where a run with a remote run_dir writes, for all processes the same; None: in data.cache_dir."""


@dataclass(frozen=True)
class HeldOutConfig:
    """Held-out loss and samples during training; they do not affect the trained weights."""

    sources: tuple[str, ...] = ()
    """Packed folders of held-out rows, with the budgets and template of data; empty: no held-out evaluation."""
    every_num_steps: Count = 500
    num_batches: Count = 4
    """Global batches of the held-out loss, the same ones every time."""
    num_samples: CountOrZero = 8
    """Held-out documents whose answer is generated and shown beside the reference, as RUN_DIR/samples/STEP.html."""
    max_new_tokens: Length = 64


@dataclass(frozen=True)
class ExecutionConfig:
    """Execution options of the decoder in training; they affect loss and gradients only through rounding.
    python -m oq2vl_jax.bench report measures which is fastest."""

    gate_up: Literal["fused", "apart"] = "fused"
    """fused: gate_proj and up_proj in one matrix product. apart: in two, as always with adapters (lora.rank)."""
    layers: Literal["one_by_one", "scan"] = "one_by_one"
    """one_by_one: unrolled. scan: over the stack; compiles in half the time, but copies weights and gradients."""
    tiles: Literal["64x64", "128x64", "128x128"] = "64x64"
    """Queries x keys of a tile of the attention kernel."""


Attention = Literal["xla", "blocked", "kernel", "kernel_interpreted"]
"""Implementations of packed attention."""
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    model: ModelConfig = cast(ModelConfig, None)  # noqa: RUF009
    """The architecture. A configuration file may leave it out: training then takes that of init_from."""
    data: DataConfig
    optimizer: OptimizerConfig
    num_steps: Count
    global_batch_size: SmallCount
    """Packed rows per optimizer step, over all devices."""
    run_dir: str = field(metadata=OPERATIONAL)
    """Folder for config.json, metrics.jsonl and checkpoints/, or s3://BUCKET/FOLDER and the like. The same command with
    the same run_dir resumes."""
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    ema: EmaConfig = EmaConfig()
    skip_spikes: bool = False
    """Do not apply a step whose loss or gradient norm lies 6 standard deviations above the mean of the last 128."""
    trainable: TrainableConfig = TrainableConfig()
    lora: LoraConfig = LoraConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata=OPERATIONAL)
    checkpoint: CheckpointConfig = field(default=CheckpointConfig(), metadata=OPERATIONAL)
    held_out: HeldOutConfig = field(default=HeldOutConfig(), metadata=OPERATIONAL)
    trackers: tuple[Tracker, ...] = field(default=(), metadata=OPERATIONAL)
    """Trackers that get the metrics besides metrics.jsonl; each needs the extra of the same name."""
    tracker_group: str | None = field(default=None, metadata=OPERATIONAL)
    """Group of runs that a tracker shows together; an ablation sets its folder's name."""
    tracker_tags: tuple[str, ...] = field(default=(), metadata=OPERATIONAL)
    """Tags of the run in trackers; an ablation sets arm, seed and stage."""
    rows_per_device: SmallCount | None = field(default=None, metadata=OPERATIONAL)
    """Microbatch: rows in one forward pass of one device; their gradients are accumulated. None: all rows at once."""
    init_from: str | None = None
    """Start from the weights of this checkpoint, a run directory (its newest one) or RUN@STEP. The data start anew."""
    init_parts: tuple[Part, ...] = PARTS
    """Parts that init_from gives; the others are drawn from seed."""
    init_optimizer: bool = False
    """Start from the optimizer's state of init_from as well, such as the moments of a trunk whose decay this run is."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of activations and matmuls; master weights, optimizer and loss are float32."""
    remat: Literal["none", "dots", "attention", "full"] = field(default="none", metadata=OPERATIONAL)
    """Activations kept for the backward pass. none: all. dots: matmul and attention outputs. attention: attention
    outputs and block inputs. full: block inputs only."""
    attention: Attention | Literal["auto"] = field(default="auto", metadata=OPERATIONAL)
    """Attention of packed rows (model/attention.py). auto: by device and row length, printed by the run. kernel needs
    a GPU; kernel_interpreted runs it slowly anywhere, for tests."""
    execution: ExecutionConfig = field(default=ExecutionConfig(), metadata=OPERATIONAL)
    gradients: Literal["fused", "plain"] = field(default="fused", metadata=OPERATIONAL)
    """fused: train/gradients.py, which holds the logits of one chunk at a time. plain: jax.grad of train/loss.py, which
    holds the logits of a microbatch; the same except for rounding, up to memory."""
    hang_seconds: Positive | None = field(default=None, metadata=OPERATIONAL)
    """A run that does one thing for so long, such as waiting for data or for other processes, writes the stacks of its
    threads and ends with exit code 75; the same command goes on. None: half an hour with several processes, else it
    waits for ever."""
    seed: Seed = 7
    """Seed of the initial weights, and of the order of the rows unless data.seed is set."""
    log_every: Count = field(default=10, metadata=OPERATIONAL)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Parts of which something is trained: they themselves, or their adapters."""
        return self.trainable.parts if self.lora.rank is None else self.lora.targets
