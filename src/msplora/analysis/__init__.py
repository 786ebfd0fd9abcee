"""What the levels of an adapter learned: measures of its updates, as numbers and as a page."""
