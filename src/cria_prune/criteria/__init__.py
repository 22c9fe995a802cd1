"""Criteria: a table of scores, the spectral family and the baselines."""
