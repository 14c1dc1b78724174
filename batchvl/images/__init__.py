"""Images on their way from their bytes to the engine: decoded and prepared."""
