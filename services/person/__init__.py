"""person: puts people to sleep."""
