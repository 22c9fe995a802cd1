"""Signals of neurons -> moments -> a graph of the neurons."""
