"""``python -m clipsteer``: the command line."""

from __future__ import annotations

import sys

from clipsteer.cli.main import main

sys.exit(main())
