"""The ``locust`` command with shorter pauses, so that a test sees soon what there is to see.

Tables are printed ten times as often, workers report to their master 15 times as often, and the
web UI answers with statistics that are fresh.
"""

from __future__ import annotations

from locust import main, runners, stats, web  # isort: skip

import sys

vars(stats)["CONSOLE_STATS_INTERVAL_SEC"] = 0.2  # 2 in Locust, where it is an int
runners.WORKER_REPORT_INTERVAL = 0.2  # 3 in Locust
web.DEFAULT_CACHE_TIME = 0.1  # 2 in Locust

if __name__ == "__main__":
    sys.argv[0] = "locust"  # for what it says of wrong arguments
    main.main()
