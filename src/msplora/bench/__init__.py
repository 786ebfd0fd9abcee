"""What a training step costs, side by side: time, memory, size. `msplora bench` is its command."""
