"""Settings: their definitions, how they are read, and the parts that they name."""
