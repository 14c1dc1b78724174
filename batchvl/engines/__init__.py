"""Engines: one contract (`protocol.py`), each in a process of its own (`child.py`), kept alive by `replica.py`."""
