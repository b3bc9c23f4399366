"""python examples/study COMMAND: see `runner`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from study.runner import main

if __name__ == "__main__":
    sys.exit(main())
