"""Child processes, messages between processes, and shared memory."""
