"""`python -m mimo_jax` is `mimo-jax`."""

from mimo_jax.cli import main

if __name__ == "__main__":
    main()
