"""The fresh projector at the decoder's learning rate, as published, or at 3 or 10 times it (Molmo2: 10, nanoVLM: 102).

python -m oq2vl_jax.ablate run emoji_projector_rate --out runs/emoji_projector_rate
"""

from oq2vl_jax.demo.emoji_bed import PREPARE, TASK
from oq2vl_jax.lab.definition import Ablation

ablation = Ablation(
    question="Does a higher learning rate of the projector help, where all parts are fresh?",
    stages={"captions": "emoji"},
    arms={
        "same": {},
        "times_3": {"captions.optimizer.projector_learning_rate": 3.6e-3},
        "times_10": {"captions.optimizer.projector_learning_rate": 1.2e-2},
    },
    baseline="same",
    tasks=(TASK,),
    prepare=PREPARE,
    smallest_effect=0.2,
)
