"""`python -m qwenq`."""

from qwenq.cli.main import main

if __name__ == "__main__":
    main()
