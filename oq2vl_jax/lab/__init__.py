"""The laboratory: whether a change makes models better, worse or no different, and how sure that is."""
