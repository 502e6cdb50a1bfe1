"""Defines every dataclass of the configuration, and the published model.

Values live in configs/*.py (a file that binds `config`) or in the config.json of a run; config_files.py reads both.
Neither file imports jax or torch, so that `--help` is instant.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from oq2vl_jax.bounds import (
    Count,
    CountOrRest,
    CountOrZero,
    Depth,
    Length,
    NotNegative,
    Positive,
    Rate,
    Seed,
    Share,
    Side,
    SmallCount,
    SmallCountOrZero,
    Vocabulary,
    Width,
    Workers,
    WorkersOrZero,
    check_bounds,
)
from oq2vl_jax.errors import UserError

ROLE = "role"


OPERATIONAL = {ROLE: "operational"}
"""Metadata of a field, or of a nested configuration, that may change when a run is resumed: it decides how something is
computed, not the result. data.sources may move, but its rows must stay the same; the fingerprint in the checkpoint's
loader state checks this (data/packing/packed.py)."""
INITIAL = {ROLE: "initial"}
"""Metadata of a field that affects fresh weights only: a checkpoint that a run starts from may differ in it."""

Template = Literal["plain", "open_qwen2vl", "open_qwen2vl_released", "chatml"]
"""Template of the text around images and turns; see data/text/codec.py."""
PromptForm = Literal["training", "published"]
"""training: the question has the form of the training documents of its template. published: the form of the published
code, which ends without the last line break, drops the token after every image and begins with <s> twice (open_qwen2vl
only)."""


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder. Features come from the second-to-last block; the last of `num_layers` is not built."""

    image_size: Side
    patch_size: Side
    hidden_size: Width
    intermediate_size: Width
    num_layers: Depth
    num_heads: Depth
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """gelu: exact, as timm trained the published checkpoint. gelu_tanh: as in Hugging Face's SigLIP config."""
    layer_norm_eps: Share = 1e-6
    patch_init_gain: Positive = field(default=1.0, metadata=INITIAL)
    """Standard deviation of a fresh patch embedding, in units of patch_dim ** -0.5. The small models of the demo learn
    shapes with 3: after 28k pictures of easy-VQA, gain 1/4 had 48 % right, gain 1 had 75 % and gain 3 had 89 %."""

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen2 decoder."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_layers: Depth
    num_heads: Depth
    num_kv_heads: Depth
    head_dim: Width
    rope_theta: Positive = 1e6
    rope_inv_freq: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rounds the rotary inverse frequencies as the published code does."""
    rms_norm_eps: Share = 1e-6
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """SigLIP -> average pooling to `num_visual_tokens` -> 2-layer MLP -> Qwen2."""

    vision: VisionConfig
    decoder: DecoderConfig
    num_visual_tokens: Length
    """Visual tokens per image; a square number. 144 in pre-training, 729 in tuning, with the same weights."""
    image_token_id: CountOrZero
    """Token id of the placeholder of a visual token. Qwen2.5: <|image_pad|> = 151655."""

    def __post_init__(self):
        check_bounds(self, prefix="model.")
        check_square("model.num_visual_tokens", self.num_visual_tokens)
        if self.vision.hidden_size % self.vision.num_heads:
            raise UserError(
                f"model.vision.num_heads = {self.vision.num_heads} does not divide "
                f"hidden_size = {self.vision.hidden_size}."
            )
        if self.decoder.num_heads % self.decoder.num_kv_heads:
            raise UserError(
                f"model.decoder.num_kv_heads = {self.decoder.num_kv_heads} does not divide "
                f"num_heads = {self.decoder.num_heads}."
            )
        if self.decoder.head_dim % 2:
            raise UserError(f"model.decoder.head_dim = {self.decoder.head_dim} is odd; rotary positions turn pairs.")
        if self.vision.num_layers < 2:
            raise UserError("model.vision.num_layers = 1; features leave the second-to-last layer, so 2 is the least.")
        if self.num_visual_tokens > self.vision.num_patches:
            raise UserError(
                f"model.num_visual_tokens = {self.num_visual_tokens} is more than the {self.vision.num_patches} "
                f"patches of a picture (image_size {self.vision.image_size}, patch_size {self.vision.patch_size})."
            )
        if self.image_token_id >= self.decoder.vocab_size:
            raise UserError(
                f"model.image_token_id = {self.image_token_id} is outside the vocabulary of {self.decoder.vocab_size}."
            )

    @staticmethod
    def open_qwen2vl_2b(num_visual_tokens: int = 144) -> "ModelConfig":
        """The published model: SigLIP-SO400M/14-384 and Qwen2.5-1.5B-Instruct (arXiv 2504.00595)."""
        return ModelConfig(
            vision=VisionConfig(
                image_size=384, patch_size=14, hidden_size=1152, intermediate_size=4304, num_layers=27, num_heads=16
            ),
            decoder=DecoderConfig(
                vocab_size=151_936,
                hidden_size=1536,
                intermediate_size=8960,
                num_layers=28,
                num_heads=12,
                num_kv_heads=2,
                head_dim=128,
            ),
            num_visual_tokens=num_visual_tokens,
            image_token_id=151_655,
        )


@dataclass(frozen=True)
class DataConfig:
    """Training data, and the budgets it was packed with (checked against each source's manifest)."""

    sources: tuple[str, ...] = field(metadata=OPERATIONAL)
    """Packed folders; with packing online, tars or instruction files."""
    num_tokens: Length
    """Tokens in a packed row."""
    max_images: SmallCount
    """Image slots in a packed row."""
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
    packing: Literal["offline", "online"] = "offline"
    """offline: sources are folders of oq2vl_jax.data.pack. online: sources are tars or instruction files, packed while
    training (data/loading/online.py); one process only."""
    images: str | None = None
    """online: folder of the pictures that instruction files name."""
    tokenizer: str | None = None
    """online: Hugging Face tokenizer folder."""
    verify: Literal["sample", "full"] = field(default="sample", metadata=OPERATIONAL)
    """Check of the packed files when a run starts. sample: size and both ends. full: every byte."""
    window: SmallCount = 512
    """online: documents packed together; more documents fill rows better, and all are read again on a restart."""
    synthetic_documents: SmallCountOrZero = 0
    """> 0: make this many captioned shapes under run_dir/data, pack them, and train on them as the only source."""


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


@dataclass(frozen=True)
class CheckpointDescription:
    """Description of weights that is needed to run or export them, whatever their origin."""

    model: ModelConfig
    template: Template
    origin: str
    """"trained", or the source of the conversion."""


def check_square(name: str, number: int) -> None:
    side = math.isqrt(max(number, 0))
    if number < 1 or side * side != number:
        raise UserError(
            f"{name} = {number} is no square number; the pooling grid is square. "
            f"Nearest: {side**2 or 1} or {(side + 1) ** 2}."
        )
