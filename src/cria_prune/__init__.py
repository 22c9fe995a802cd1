"""Cria: makes trained neural networks smaller."""
