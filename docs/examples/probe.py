"""A linear probe on the visual tokens: can the shape in a picture be read from them?

python docs/examples/probe.py --checkpoint runs/tiny

Prints the accuracy on pictures that the probe was not fitted to.
"""

import argparse

import jax.numpy as jnp
import numpy as np

import oq2vl_jax
from oq2vl_jax.data.packing.synthetic import captioned_shapes
from oq2vl_jax.data.samples.images import decode_image

NUM_PICTURES, NUM_FITTED, RIDGE = 320, 240, 1e-2


def probe(checkpoint):
    """Returns the share of held-out pictures whose shape a linear map of the mean visual token names."""
    loaded = oq2vl_jax.load(checkpoint)
    samples = list(captioned_shapes(NUM_PICTURES, seed=1))
    size = loaded.config.vision.image_size
    images = jnp.asarray(np.stack([decode_image(sample["png"], size) for sample in samples]))
    features = np.asarray(loaded.model.encode(images).mean(axis=1))
    features = np.column_stack([(features - features.mean(0)) / (features.std(0) + 1e-6), np.ones(len(features))])
    names, shapes = np.unique([sample["txt"].split()[2] for sample in samples], return_inverse=True)
    x, y = features[:NUM_FITTED], np.eye(len(names))[shapes[:NUM_FITTED]]
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    return float(((features[NUM_FITTED:] @ weights).argmax(1) == shapes[NUM_FITTED:]).mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fits a linear probe on the visual tokens of a checkpoint.")
    parser.add_argument("--checkpoint", required=True)
    print(f"accuracy {probe(parser.parse_args().checkpoint):.3f} (chance 0.33)")
