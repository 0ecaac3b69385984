"""What every test may rely on: no network, whatever the environment says."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
