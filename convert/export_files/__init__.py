"""Files that an exported model takes along: the modeling module of pooled models, chat templates, the model card."""
