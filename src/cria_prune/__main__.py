"""`python -m cria_prune` is the command `cria`."""

from cria_prune.cli.main import main

if __name__ == "__main__":
    main()
