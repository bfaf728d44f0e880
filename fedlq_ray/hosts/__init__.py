"""Where clients live: in this process, or as actors of Ray."""
