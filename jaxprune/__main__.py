"""The command ``jaxprune``, also as ``python -m jaxprune``."""

import sys

from jaxprune._cli._parser import main
from jaxprune._interrupt import raise_again

raise_again()

if __name__ == "__main__":
    sys.exit(main())
