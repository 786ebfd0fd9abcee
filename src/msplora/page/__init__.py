"""What all pages have in common: their look, their escaping, and how they are written."""
