"""Supervision of engine processes: start, feed, watch, restart and stop them."""
