"""Durable files: file-system calls that can be made to fail in tests, object stores, uploads, temporary directories."""
