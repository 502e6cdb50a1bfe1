"""The published pre-training: packed captions, 144 visual tokens, vision frozen, one epoch of 28.4M pairs.

    python -m oq2vl_jax.train configs/pretrain.py --init-from checkpoints/siglip_qwen

8 x A100-40G; the paper reports 220 GPU-hours for 5B tokens with its own code. This code has not run at that size.
Values: arXiv 2504.00595, table of hyper-parameters. The effective weight decay of the published code was 0
(--optimizer.weight-decay 0 reproduces that). Packed with: python -m oq2vl_jax.data.pack --num-tokens 4096
--max-images 28 --visual-tokens 144 --template plain ...
"""

from oq2vl_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainableConfig, TrainConfig

config = TrainConfig(
    model=ModelConfig.open_qwen2vl_2b(num_visual_tokens=144),
    data=DataConfig(
        sources=("data/packed/pretrain",),
        num_tokens=4096,
        max_images=28,
        template="plain",
    ),
    optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=0.01, max_grad_norm=1.0),
    trainable=TrainableConfig(vision=False, projector=True, decoder=True),
    num_steps=4770,
    global_batch_size=256,
    rows_per_device=2,  # bench plan with remat dots: 24 of 36 usable GiB of an A100-40G
    run_dir="runs/pretrain",
    init_from="checkpoints/siglip_qwen",
    remat="dots",
)
