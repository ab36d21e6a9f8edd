"""What runs inside the sandbox, by the sandbox's own Python: standard library alone."""
