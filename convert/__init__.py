"""The weight bridge: PyTorch and Hugging Face checkpoints in, Hugging Face and Prismatic checkpoints out.

    from_hf          SigLIP + Qwen2.5, or a Llava-style model   ->  Orbax checkpoint
    from_prismatic   the published Open-Qwen2VL checkpoints     ->  Orbax checkpoint
    to_hf            Orbax checkpoint  ->  LlavaForConditionalGeneration, or the same plus one module where it pools
    to_prismatic     Orbax checkpoint  ->  the layout that the published code loads

weight_map.py is the one table of all directions; tensors are streamed through it one stacked array at a time.
"""
