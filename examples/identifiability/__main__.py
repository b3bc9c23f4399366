"""python examples/identifiability COMMAND: see `runner`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from identifiability.runner import main

if __name__ == "__main__":
    sys.exit(main())
