"""Average pooling, as published, or pixel shuffle, which keeps every patch: both give 16 visual tokens.

python -m oq2vl_jax.ablate run emoji_connector --out runs/emoji_connector
"""

from oq2vl_jax.demo.emoji_bed import PREPARE, TASK
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Does pixel shuffle in place of average pooling help a connector with as many visual tokens?",
    stages={"captions": "emoji"},
    arms={"average_pool": {}, "pixel_shuffle": {"captions.model.projector.kind": "pixel_shuffle_mlp"}},
    baseline="average_pool",
    tasks=(TASK,),
    prepare=PREPARE,
    smallest_effect=0.2,
)
