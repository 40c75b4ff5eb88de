"""Tasks, one folder for each domain."""
