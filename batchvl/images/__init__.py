"""Pictures: fetched, held in the arena, decoded and prepared."""
