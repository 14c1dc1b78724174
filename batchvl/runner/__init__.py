"""Runs: the stages wired together, from the options to the summary."""
