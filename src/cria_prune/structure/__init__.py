"""What may be removed: unit groups, found from a model's ATen operations."""
