"""ElaLoRA (arXiv 2504.00254): low-rank adapters whose ranks move between layers in training."""
