"""The command ``jaxprune``, also as ``python -m jaxprune``."""

import sys

from jaxprune._cli._parser import main

if __name__ == "__main__":
    sys.exit(main())
