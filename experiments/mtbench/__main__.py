"""`python -m experiments.mtbench`."""

import sys

from experiments.mtbench.cli import main

sys.exit(main())
