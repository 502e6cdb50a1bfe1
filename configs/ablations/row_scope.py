"""Ablation: the published attention: packed documents see each other and positions run through the row.

python -m oq2vl_jax.train configs/ablations/row_scope.py
"""

import dataclasses
from pathlib import Path

from oq2vl_jax.config_files import load_config

pretrain = load_config(str(Path(__file__).parents[1] / "pretrain.py"))

config = dataclasses.replace(
    pretrain, data=dataclasses.replace(pretrain.data, attention_scope="row"), run_dir="runs/ablation_row_scope"
)
