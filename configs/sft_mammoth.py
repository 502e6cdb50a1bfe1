"""The published tuning on MAmmoTH-VL-10M: as configs/sft_llava.py, 78,125 steps for one epoch of 10M examples.

python -m oq2vl_jax.train configs/sft_mammoth.py --init-from runs/pretrain
"""

import dataclasses
from pathlib import Path

from oq2vl_jax.config_files import load_config

llava = load_config(str(Path(__file__).with_name("sft_llava.py")))

config = dataclasses.replace(
    llava,
    data=dataclasses.replace(llava.data, sources=("data/packed/mammoth_vl_10m",)),
    num_steps=78_125,
    run_dir="runs/sft_mammoth",
)
