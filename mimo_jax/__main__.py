"""`python -m mimo_jax` is `mimo-jax`."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C while it is still being imported ends it like later."""
    try:
        from mimo_jax.cli import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
