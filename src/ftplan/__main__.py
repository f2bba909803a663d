"""``python -m ftplan``: the same as the console script."""

from ftplan.cli import main

if __name__ == "__main__":
    main()
