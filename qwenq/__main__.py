"""`python -m qwenq`."""

from __future__ import annotations

from qwenq.cli.main import main

if __name__ == "__main__":
    main()
