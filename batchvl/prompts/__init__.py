"""Prompts: a manifest's row becomes a request."""
