"""Kinds of data and metric: images, texts, folders, lm-eval; and the networks of the recipes."""
