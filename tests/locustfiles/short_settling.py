"""For ``-f``, behind ``find_capacity.py``: a step is measured soon after its users are there."""

from __future__ import annotations

import find_capacity

find_capacity.SETTLING = 0.2
