"""What the vanilla configuration of a Hugging Face model can hold, and that configuration."""

from cria_prune.vanilla.build import config_parts
from cria_prune.vanilla.holdable import Holdable, holdable

__all__ = ["Holdable", "config_parts", "holdable"]
