"""Laptop bed of ablations: names of 500 emoji, all parts trained from scratch, 16 visual tokens per image.

    python -m oq2vl_jax.train configs/emoji.py

Takes about 4 minutes on one core with AVX2, in the folder in which the commands of oq2vl_jax/demo/emoji_bed.py were
run. The model is the demo's. Ablations change it: configs/ablations/emoji_connector.py is one.
"""

import dataclasses
from pathlib import Path

from oq2vl_jax.config import HeldOutConfig
from oq2vl_jax.config_files import load_config

demo = load_config(str(Path(__file__).with_name("easy_vqa.py")))

config = dataclasses.replace(
    demo,
    data=dataclasses.replace(demo.data, sources=("emoji/packed/captions",)),
    schedule=dataclasses.replace(demo.schedule, kind="cosine"),
    num_steps=300,
    run_dir="runs/emoji",
    held_out=HeldOutConfig(sources=("emoji/packed/held_out",), every_num_steps=50, num_batches=2, num_samples=0),
    checkpoint=dataclasses.replace(demo.checkpoint, every_num_steps=100),
)
