"""Engines: token ids in, vectors out."""

from lift_embedder.engines.protocol import Engine, EngineKind, create_engine, resolve_kind

__all__ = ["Engine", "EngineKind", "create_engine", "resolve_kind"]
