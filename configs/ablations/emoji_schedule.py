"""Cosine, as published, or warm-up, stable, decay: a trunk that many budgets can branch from.

python -m oq2vl_jax.ablate run emoji_schedule --out runs/emoji_schedule
"""

from oq2vl_jax.demo.emoji_bed import PREPARE, TASK
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Does a schedule of warm-up, stable and decay cost anything against a cosine?",
    stages={"captions": "emoji"},
    arms={"cosine": {}, "wsd": {"captions.schedule.kind": "wsd"}},
    baseline="cosine",
    tasks=(TASK,),
    prepare=PREPARE,
    smallest_effect=0.2,
)
