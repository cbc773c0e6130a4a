"""The asyncio shell: one inbox, one engine; the only room that knows both decisions and world.

`shell` turns the engine and hands out its actions, `executors` carry each action out, `world` makes
the drivers from the settings, `answers` serves the control socket.
"""

from nfsha.daemon.run import DaemonError, run

__all__ = ["DaemonError", "run"]
