"""`msplora inspect`: what a folder holds, and what is suspicious about it; no model is loaded."""
