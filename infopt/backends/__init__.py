"""Back-ends that cannot share infopt's environment: each has a venv of its own, and a folder on disk as the interface."""
