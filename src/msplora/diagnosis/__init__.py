"""`msplora doctor`: an adapter on its base, checked one thing at a time."""
