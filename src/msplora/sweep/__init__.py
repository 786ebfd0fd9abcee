"""Many training runs that differ in some keys: the work behind `msplora sweep`."""
