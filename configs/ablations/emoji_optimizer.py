"""AdamW, as published, or Muon: the learning rate of both is tuned alike, on a seed that does not judge.

python -m oq2vl_jax.ablate run emoji_optimizer --out runs/emoji_optimizer
"""

from oq2vl_jax.demo.emoji_bed import PREPARE, TASK
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Is Muon better than AdamW for a small model from scratch, both tuned alike?",
    stages={"captions": "emoji"},
    arms={"adamw": {"captions.optimizer.kind": "adamw"}, "muon": {}},
    baseline="adamw",
    tasks=(TASK,),
    prepare=PREPARE,
    smallest_effect=0.2,
    tune={"captions.optimizer.learning_rate": (0.5, 1.0, 2.0)},
    tune_seeds=(101,),
)
