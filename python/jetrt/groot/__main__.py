"""`python -m jetrt.groot SCRIPT`."""

from __future__ import annotations

from .script import main

if __name__ == "__main__":
    main()
