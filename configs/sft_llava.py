"""The published tuning on LLaVA-665k: 729 visual tokens (the projector's pooling is then the identity), one epoch.

    python -m oq2vl_jax.train configs/sft_llava.py --init-from runs/pretrain

The rows, from the published JSON and its pictures:

    python -m oq2vl_jax.data.pack --shards llava_v1_5_mix665k.json --images llava_images --out data/packed/llava_665k \\
        --tokenizer TOKENIZER --num-tokens 4096 --max-images 5 --visual-tokens 729

A batch of the published code is 128 single examples with padding. Here a row packs about four conversations, so 32 rows
hold as many examples.
"""

from oq2vl_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainableConfig, TrainConfig

config = TrainConfig(
    model=ModelConfig.open_qwen2vl_2b(num_visual_tokens=729),
    data=DataConfig(
        sources=("data/packed/llava_665k",),
        num_tokens=4096,
        max_images=5,
        template="open_qwen2vl",
    ),
    optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.1, max_grad_norm=1.0),
    trainable=TrainableConfig(vision=False, projector=True, decoder=True),
    num_steps=5197,
    global_batch_size=32,
    rows_per_device=1,
    run_dir="runs/sft_llava",
    init_from="runs/pretrain",
    remat="dots",
)
