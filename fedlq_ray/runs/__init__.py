"""A run: its folder, its checkpoints, and how it begins, ends and resumes."""
