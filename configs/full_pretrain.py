"""The published "full-pretrain": configs/pretrain.py with the vision encoder trained too and full remat.

python -m oq2vl_jax.train configs/full_pretrain.py --init-from checkpoints/siglip_qwen
"""

import dataclasses
from pathlib import Path

from oq2vl_jax.config import TrainableConfig
from oq2vl_jax.config_files import load_config

pretrain = load_config(str(Path(__file__).with_name("pretrain.py")))

config = dataclasses.replace(
    pretrain,
    trainable=TrainableConfig(vision=True, projector=True, decoder=True),
    run_dir="runs/full_pretrain",
    remat="full",
)
