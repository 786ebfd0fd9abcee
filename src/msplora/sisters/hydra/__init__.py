"""Hydra (arXiv 2309.06922): a low-rank branch on a layer's input and one on its output."""
