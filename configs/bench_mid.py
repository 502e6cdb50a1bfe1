"""Benchmark for two CPU cores only: width 512, 8 layers, the full vocabulary, four captions per row of 1,024 tokens.

    python -m oq2vl_jax.bench step configs/bench_mid.py
    python -m oq2vl_jax.train configs/bench_mid.py --data.sources PACKED      # rows of 1,024 tokens, 4 images

make bench-peers compares it with PyTorch. A caption has 225 visual tokens here, so that four of them fill a row.
"""

from oq2vl_jax.config import (
    DataConfig,
    DecoderConfig,
    ExecutionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)

config = TrainConfig(
    model=ModelConfig(
        vision=VisionConfig(
            image_size=224, patch_size=14, hidden_size=384, intermediate_size=1536, num_layers=7, num_heads=6
        ),
        decoder=DecoderConfig(
            vocab_size=151_936,
            hidden_size=512,
            intermediate_size=2048,
            num_layers=8,
            num_heads=8,
            num_kv_heads=2,
            head_dim=64,
        ),
        num_visual_tokens=225,
        image_token_id=151_655,
    ),
    data=DataConfig(num_tokens=1024, max_images=4, template="plain"),
    optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=0.01),
    num_steps=100,
    global_batch_size=2,
    rows_per_device=2,
    run_dir="runs/bench_mid",
    compute_dtype="float32",
    execution=ExecutionConfig(gate_up="apart"),  # of a fused product, a CPU would join and cut the gradients
)
