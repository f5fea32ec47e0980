"""`python -m rlcore` is `rlcore`."""

import sys

from rlcore.cli.main import main

sys.exit(main())
