"""A run in progress, whatever the task."""
