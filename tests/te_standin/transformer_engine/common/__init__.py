"""What TE shares between frameworks: recipes."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
