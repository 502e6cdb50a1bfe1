"""Provides the function for lmms-eval's entry point. Its import is inside the function: at the top of the module it
would be circular, and lmms-eval would only warn and continue without the model."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="oq2vl_jax", simple_class_path="oq2vl_jax.eval.lmms_eval_adapter.OQ2VL")
