"""lift_embedder: embeds captions with a frozen text encoder, once, into a lift_cache."""

from lift_embedder.runtime import join_parent

__version__ = "0.1.0"

# The engine's child is spawned and re-imports the main module before it imports vllm. This is the first line
# of ours that it runs; in every other process it does nothing.
join_parent()
