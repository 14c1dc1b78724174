"""The options of a run: their types, defaults and sources."""
