"""Scores, groups and a budget -> what stays. Pure: no model, no files."""
