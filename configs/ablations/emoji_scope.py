"""Packed documents that see each other, as published, or that do not.

python -m oq2vl_jax.ablate run emoji_scope --out runs/emoji_scope
"""

from oq2vl_jax.demo.emoji_bed import PREPARE, TASK
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Do packed documents that see each other hurt?",
    stages={"captions": "emoji"},
    arms={"document": {}, "row": {"captions.data.attention_scope": "row"}},
    baseline="document",
    tasks=(TASK,),
    prepare=PREPARE,
    smallest_effect=0.2,
)
