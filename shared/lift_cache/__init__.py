"""The contract between the embedder and the trainer: caption keys, recipes, encodings and the cache itself."""

__version__ = "0.1.0"
