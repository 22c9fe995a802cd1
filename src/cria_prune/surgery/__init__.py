"""Removing units for real, and proving that it was done right."""
