"""`python -m ee_scale` (and `torchrun -m ee_scale`) is `ee-scale`."""

import sys

from ee_scale.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
