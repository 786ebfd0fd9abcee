"""The page of a plan: the pyramid drawn, and what it costs at other ranks, groups and levels."""
