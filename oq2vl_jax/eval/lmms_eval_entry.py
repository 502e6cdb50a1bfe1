"""What lmms-eval's entry-point group finds. Its imports wait until it is called: at the top of a module they would be
circular, and lmms-eval would only warn and go on without the model."""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(model_id="oq2vl_jax", simple_class_path="oq2vl_jax.eval.lmms_eval_adapter.OQ2VL")
