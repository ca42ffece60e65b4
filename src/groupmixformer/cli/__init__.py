"""gmf: the command line."""
