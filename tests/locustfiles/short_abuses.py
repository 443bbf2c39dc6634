"""For ``-f``, behind ``abnormal_clients.py``: abuses have shorter pauses."""

from __future__ import annotations

import abnormal_clients

abnormal_clients.AbnormalClient.silence = 0.3
abnormal_clients.AbnormalClient.trickle_pause = 0.02
