"""Images and streams, whatever the task."""
