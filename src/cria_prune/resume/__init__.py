"""Work that was stopped goes on: how a round goes to and from a file, and the states made of that."""
