"""A run on disk: its folder, its checkpoints, and its copy in an object store."""
