"""What the backbone is used for, one folder a task."""
