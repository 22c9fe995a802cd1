"""The command `cria`: parse, call, print."""
