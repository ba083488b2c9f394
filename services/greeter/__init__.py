"""greeter: greets, and streams."""
