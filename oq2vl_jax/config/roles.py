"""Roles of configuration fields, as metadata at the field."""

ROLE = "role"


OPERATIONAL = {ROLE: "operational"}
"""Metadata of a field, or of a nested configuration, that may change when a run is resumed: it decides how something is
computed, not the result. data.sources may move, but its rows must stay the same; the fingerprint in the checkpoint's
loader state checks this (data/packing/packed.py)."""
INITIAL = {ROLE: "initial"}
"""Metadata of a field that affects fresh weights only: a checkpoint that a run starts from may differ in it."""
