"""What the tests share with test_smoke.py: commands, one short run, and where the real test data is."""
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_smoke import stepped, tiny_run  # fixtures

DATA = Path(os.environ.get("TAESD_TEST_DATA", ""))
