"""Data, metric and dense model of the recipes."""
