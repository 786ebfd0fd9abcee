"""The ``msplora`` command: one thin file per verb; the work is done by the library."""
