"""Demo, stage 1: trains everything from scratch on easy-VQA captions ("a blue circle"), 16 visual tokens per image.

    python -m oq2vl_jax.train configs/easy_vqa.py

Run it in the folder in which `make demo` (see README) has written demo/packed/captions.
"""

from oq2vl_jax.config import (
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainableConfig,
    TrainConfig,
    VisionConfig,
)

config = TrainConfig(
    model=ModelConfig(
        vision=VisionConfig(
            image_size=64,
            patch_size=8,
            hidden_size=96,
            intermediate_size=384,
            num_layers=4,
            num_heads=2,
            activation="gelu_tanh",
            patch_init_gain=3.0,
        ),
        decoder=DecoderConfig(
            vocab_size=8256,
            hidden_size=128,
            intermediate_size=384,
            num_layers=3,
            num_heads=2,
            num_kv_heads=1,
            head_dim=64,
            rope_theta=1e4,
        ),
        num_visual_tokens=16,
        image_token_id=8204,
    ),
    data=DataConfig(sources=("demo/packed/captions",), num_tokens=256, max_images=10, template="plain", num_threads=1),
    optimizer=OptimizerConfig(kind="muon", learning_rate=1.2e-3, weight_decay=0.01, beta2=0.98),
    schedule=ScheduleConfig(kind="wsd", warmup_fraction=0.05),
    trainable=TrainableConfig(vision=True, projector=True, decoder=True),
    num_steps=700,
    global_batch_size=8,
    run_dir="demo/runs/captions",
    checkpoint=CheckpointConfig(every_num_steps=250, keep=1),
    compute_dtype="float32",
    log_every=20,
)
