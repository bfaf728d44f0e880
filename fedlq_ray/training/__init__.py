"""What a client does: local SGD, and its round as a pure function."""
