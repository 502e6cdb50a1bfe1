"""Ablation: the published attention: packed documents see each other and positions run through the row.

python -m oq2vl_jax.train configs/ablations/row_scope.py
"""

import dataclasses
from pathlib import Path
from runpy import run_path

pretrain = run_path(str(Path(__file__).parents[1] / "pretrain.py"))["config"]

config = dataclasses.replace(
    pretrain, data=dataclasses.replace(pretrain.data, attention_scope="row"), run_dir="runs/ablation_row_scope"
)
