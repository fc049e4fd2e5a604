"""What `lift-cache` can do with a cache, one module per tool: its logic, and its command."""
