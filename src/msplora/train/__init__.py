"""Training runs: the work behind `msplora train`, `eval`, `predict`, `generate` and `demo`."""
