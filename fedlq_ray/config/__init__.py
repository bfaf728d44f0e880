"""Settings: what they are, how they are read, and the parts that they name."""
