"""A training run."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from oq2vl_jax.bounds import (
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
)
from oq2vl_jax.config.data import DataConfig
from oq2vl_jax.config.model import ModelConfig
from oq2vl_jax.config.roles import OPERATIONAL


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay to zero."""

    learning_rate: Rate
    weight_decay: NotNegative
    """On matrices only. The published run's effective decay was 0 (its groups were built from flattened shards)."""
    warmup_fraction: Share = 0.03
    max_grad_norm: Positive = 1.0
    vision_learning_rate: Rate | None = None
    """Peak learning rate of the vision encoder; None: learning_rate. The schedule's shape is the same."""
    projector_learning_rate: Rate | None = None
    decoder_learning_rate: Rate | None = None
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Share = 1e-8


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
    """fused: gate_proj and up_proj in one matrix product. apart: in two."""
    layers: Literal["one_by_one", "scan"] = "one_by_one"
    """one_by_one: unrolled. scan: over the stack; compiles in half the time, but copies weights and gradients."""
    tiles: Literal["64x64", "128x64", "128x128"] = "64x64"
    """Queries x keys of a tile of the attention kernel."""


Attention = Literal["xla", "blocked", "kernel", "kernel_interpreted"]
"""Implementations of packed attention."""
Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class TrainConfig:
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    num_steps: Count
    global_batch_size: SmallCount
    """Packed rows per optimizer step, over all devices."""
    run_dir: str = field(metadata=OPERATIONAL)
    """Folder for config.json, metrics.jsonl and checkpoints/. The same command with the same run_dir resumes."""
    trainable: TrainableConfig = TrainableConfig()
    mesh: MeshConfig = field(default=MeshConfig(), metadata=OPERATIONAL)
    checkpoint: CheckpointConfig = field(default=CheckpointConfig(), metadata=OPERATIONAL)
    held_out: HeldOutConfig = field(default=HeldOutConfig(), metadata=OPERATIONAL)
    trackers: tuple[Tracker, ...] = field(default=(), metadata=OPERATIONAL)
    """Trackers that get the metrics besides metrics.jsonl; each needs the extra of the same name."""
    rows_per_device: SmallCount | None = field(default=None, metadata=OPERATIONAL)
    """Microbatch: rows in one forward pass of one device; their gradients are accumulated. None: all rows at once."""
    init_from: str | None = None
    """Start from the weights of this checkpoint (weights only; the optimizer and the data start anew)."""
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
    holds the logits of a microbatch; the same except for rounding, and the place to try another loss."""
    seed: Seed = 7
    log_every: Count = field(default=10, metadata=OPERATIONAL)
