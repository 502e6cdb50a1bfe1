"""The four metrics of MLM-Filter (arXiv 2403.02677), integers 0-100."""

from typing import Literal, get_args

Metric = Literal["image_text_matching", "object_detail_fulfillment", "caption_text_quality", "semantic_understanding"]
METRICS: tuple[Metric, ...] = get_args(Metric)
