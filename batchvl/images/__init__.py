"""Images on their way from the manifest to the engine: fetched, decoded and prepared."""
