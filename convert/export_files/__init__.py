"""Files that an export adds to the weights: the modeling module of pooled models, chat templates, the model card."""
