"""A run: its folder and files, checkpoints, log and report."""
