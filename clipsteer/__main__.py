from __future__ import annotations

import sys

from clipsteer.cli import main

sys.exit(main())
