"""Converts weights: imports PyTorch and Hugging Face checkpoints, exports Hugging Face and Prismatic checkpoints.

    from_hf          SigLIP + Qwen2.5, or a Llava-style model   ->  Orbax checkpoint
    from_prismatic   the published Open-Qwen2VL checkpoints     ->  Orbax checkpoint
    to_hf            Orbax checkpoint  ->  LlavaForConditionalGeneration, plus one module if that class does not suffice
    to_prismatic     Orbax checkpoint  ->  the layout that the published code loads
    from_clip        a Hugging Face CLIP, to score data          ->  Orbax checkpoint

weight_map.py holds the one weight table for all directions. Tensors stream through it one stacked array at a time.
"""
