"""Every dataclass of the configuration.

Values live in configs/*.py (a file that binds `config`) or in the config.json of a run; config_files.py reads both.
Nothing in this folder imports jax or torch, so that `--help` is instant.
"""

from oq2vl_jax.config.checkpoint import CheckpointDescription
from oq2vl_jax.config.data import DataConfig, OnlineConfig, PromptForm, SyntheticConfig, Template
from oq2vl_jax.config.model import DecoderConfig, ModelConfig, VisionConfig, check_square
from oq2vl_jax.config.roles import INITIAL, OPERATIONAL, ROLE
from oq2vl_jax.config.train import (
    Attention,
    CheckpointConfig,
    ExecutionConfig,
    HeldOutConfig,
    MeshConfig,
    OptimizerConfig,
    Tracker,
    TrainableConfig,
    TrainConfig,
)

__all__ = [
    "INITIAL",
    "OPERATIONAL",
    "ROLE",
    "Attention",
    "CheckpointConfig",
    "CheckpointDescription",
    "DataConfig",
    "DecoderConfig",
    "ExecutionConfig",
    "HeldOutConfig",
    "MeshConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "PromptForm",
    "SyntheticConfig",
    "Template",
    "Tracker",
    "TrainConfig",
    "TrainableConfig",
    "VisionConfig",
    "check_square",
]
