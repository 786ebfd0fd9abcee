"""Methods on the same work, each at its own best learning rate: `msplora bake-off`."""
