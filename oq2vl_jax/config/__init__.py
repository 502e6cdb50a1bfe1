"""Every dataclass of the configuration.

Values live in configs/*.py (a file that binds `config`) or in the config.json of a run; config_files.py reads both.
Nothing in this folder imports jax or torch, so that `--help` is instant.
"""

from oq2vl_jax.config.checkpoint import CheckpointDescription, Weights
from oq2vl_jax.config.data import DataConfig, OnlineConfig, PromptForm, SyntheticConfig, Template
from oq2vl_jax.config.model import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
    check_square,
    shuffle_side,
)
from oq2vl_jax.config.roles import INITIAL, OPERATIONAL, ROLE
from oq2vl_jax.config.train import (
    PARTS,
    Attention,
    CheckpointConfig,
    EmaConfig,
    ExecutionConfig,
    HeldOutConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    Part,
    ScheduleConfig,
    Tracker,
    TrainableConfig,
    TrainConfig,
)

__all__ = [
    "INITIAL",
    "OPERATIONAL",
    "PARTS",
    "ROLE",
    "Attention",
    "CheckpointConfig",
    "CheckpointDescription",
    "DataConfig",
    "DecoderConfig",
    "EmaConfig",
    "ExecutionConfig",
    "HeldOutConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "Part",
    "ProjectorConfig",
    "PromptForm",
    "ScheduleConfig",
    "SyntheticConfig",
    "Template",
    "Tracker",
    "TrainConfig",
    "TrainableConfig",
    "VisionConfig",
    "Weights",
    "check_square",
    "shuffle_side",
]
