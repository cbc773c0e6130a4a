"""What the daemon says of a planned move of the service before it begins: may it be.

The table of guards (`handover_guards`) shows all of them with what was found on both nodes, never
only the first that fails. Nothing here decides a move: the core looks at its own conditions once
more when it is asked for one.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nfsha.core.model import Role
from nfsha.daemon import handover_guards
from nfsha.daemon.handover_guards import Copies, View
from nfsha.daemon.node_guards import Guarded
from nfsha.daemon.shell import Shell
from nfsha.host.control import CommandError

Facts = dict[str, Any]


class HandoverAnswers:
    """Answers of one daemon about moves of the service."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    async def look(self, *, young_ms: int = 0) -> None:
        """Has both nodes look at themselves, so that the guards judge what is so now.

        Unless they did so for a question of at most `young_ms` ago. Takes half a second, and
        `nfs_facts.ANSWER_WITHIN_S` where the other node does not answer.
        """
        await self._shell.world.nfs_facts.ask(young_ms=young_ms)

    def plan(self, to: Role) -> Facts:
        """The table of guards for a move to the node of this role, by the last look."""
        guards = self._guards(to)
        return {
            "to": str(to),
            "ok": all(one.ok for one in guards),
            "guards": [asdict(one) for one in guards],
        }

    def _guards(self, to: Role) -> list[Guarded]:
        shell, settings = self._shell, self._shell.world.settings
        if shell.engine is None:
            raise CommandError("the daemon is still starting: repeat in a moment")
        facts = shell.world.nfs_facts
        view = View(
            state=shell.engine.state,
            now_ms=shell.world.clock_ms(),
            to=to,
            vips=settings.vips,
            ports=settings.firewall.ports,
            hooks=settings.hooks.given,
            own=facts.own,
            heard=facts.heard,
            refused=facts.refused,
            copies=self._copies(),
        )
        return list(handover_guards.guards(view))

    def _copies(self) -> Copies | None:
        replicator = self._shell.world.replication.replicator
        if replicator is None:
            return None
        inventory = replicator.inventory
        return Copies(
            pairs=inventory.pairs(),
            told=inventory.there is not None,
        )
