"""Named tasks."""
