"""sum: adds numbers."""
