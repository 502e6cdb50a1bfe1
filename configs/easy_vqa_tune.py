"""Demo, stage 2: trains on easy-VQA questions as conversations, 64 visual tokens per image (low to high resolution).

    python -m oq2vl_jax.train configs/easy_vqa_tune.py

Starts from the weights of stage 1; the projector is the same, only its pooling grid is finer (4x4 -> 8x8). The encoder
is frozen, as in the published tuning, because further training makes it forget shapes (docs/experiments.md).
"""

import dataclasses
from pathlib import Path

from oq2vl_jax.config import TrainableConfig
from oq2vl_jax.config_files import load_config

captions = load_config(str(Path(__file__).with_name("easy_vqa.py")))

config = dataclasses.replace(
    captions,
    model=dataclasses.replace(captions.model, num_visual_tokens=64),
    data=dataclasses.replace(
        captions.data,
        sources=("demo/packed/questions",),
        num_tokens=300,
        max_images=2,
        template="open_qwen2vl",
    ),
    trainable=TrainableConfig(vision=False, projector=True, decoder=True),
    num_steps=1500,
    global_batch_size=8,
    run_dir="demo/runs/questions",
    init_from="demo/runs/captions",
)
