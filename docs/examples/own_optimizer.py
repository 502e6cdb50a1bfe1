"""An optimizer of one's own: Lion (arXiv 2302.06675).

python -m oq2vl_jax.train tiny --run-dir runs/lion --optimizer.own docs/examples/own_optimizer.py:lion \
    --optimizer.learning-rate 3e-4
"""

import optax

from oq2vl_jax.train.optimizer import decay_mask


def lion(config):
    """Returns the transformation at learning rate 1; the run clips before it and applies the schedule after it."""
    return optax.lion(1.0, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
