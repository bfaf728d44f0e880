"""Several runs of one comparison."""
