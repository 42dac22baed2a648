"""``python -m monoquant_core.cli``: the command without its script."""

import sys

from monoquant_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
