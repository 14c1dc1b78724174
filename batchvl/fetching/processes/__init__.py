"""Fetch processes: they send the requests that the runner decides on, and write images into its arena."""
