"""The published attention at the published size: packed documents see each other, and positions run through the row.

python -m oq2vl_jax.ablate run pretrain_scope --out runs/scope --executor slurm --num-workers 6 --gpus-per-worker 8

Seeds differ in the fresh projector and in the order of the rows; encoder and decoder are the pre-trained ones.
"""

from oq2vl_jax.lab.definition import Ablation

SHARED = {
    "pretrain.init_parts": ("vision", "decoder"),
    "pretrain.held_out.sources": ("data/packed/held_out",),
}

ablation = Ablation(
    question="Do packed documents that see each other hurt pre-training?",
    stages={"pretrain": "pretrain"},
    arms={"document": SHARED, "row": SHARED | {"pretrain.data.attention_scope": "row"}},
    baseline="document",
    seeds=(1, 2, 3),
    primary="held_out_loss",
    smallest_effect=0.005,
)
