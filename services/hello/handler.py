"""What hello does."""


class Hello:
    """Greets, in Chinese."""

    async def HelloWorld(self, name: str, /) -> str:
        """Return the name with " 你好" after it."""
        return f"{name} 你好"
