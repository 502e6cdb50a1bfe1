"""Runs the whole training path in seconds on a CPU, on a little synthetic data. No quality is expected.

python -m oq2vl_jax.train configs/tiny.py --run-dir runs/tiny
"""

from oq2vl_jax.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    TrainableConfig,
    TrainConfig,
    VisionConfig,
)

config = TrainConfig(
    model=ModelConfig(
        vision=VisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            intermediate_size=64,
            num_layers=3,
            num_heads=2,
            patch_init_gain=3.0,
        ),
        decoder=DecoderConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            rope_theta=1e4,
        ),
        num_visual_tokens=4,
        image_token_id=268,
    ),
    data=DataConfig(num_tokens=128, max_images=8, kind="synthetic", template="plain"),
    optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.01),
    trainable=TrainableConfig(vision=True),
    num_steps=60,
    global_batch_size=8,
    run_dir="runs/tiny",
    checkpoint=CheckpointConfig(every_num_steps=10),
    compute_dtype="float32",
    log_every=5,
)
