"""Two graphs of the same neurons -> the pencil -> one score per neuron."""
