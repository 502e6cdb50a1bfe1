"""The published "full-pretrain": configs/pretrain.py with the vision encoder trained too and full remat.

python -m oq2vl_jax.train configs/full_pretrain.py --init-from checkpoints/siglip_qwen
"""

import dataclasses
from pathlib import Path
from runpy import run_path

from oq2vl_jax.config import TrainableConfig

pretrain = run_path(str(Path(__file__).with_name("pretrain.py")))["config"]

config = dataclasses.replace(
    pretrain,
    trainable=TrainableConfig(vision=True, projector=True, decoder=True),
    run_dir="runs/full_pretrain",
    remat="full",
)
