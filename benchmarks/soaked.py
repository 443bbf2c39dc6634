"""The user of the soak: in a room with accounting, and with a heartbeat.

locust -f locustfile.py,plugins/delivery.py,benchmarks/soaked.py SoakedClient
"""

from __future__ import annotations

import delivery


class SoakedClient(delivery.RoomClient):
    """``RoomClient`` that says that it is alive."""

    heartbeat = 2.0

    def on_heartbeat(self) -> None:
        """Send a command that nobody answers."""
        self.client.send_chat("/alive", echo="none", name="heartbeat")
