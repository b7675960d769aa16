"""The bare loop: plain Python around a session."""

from __future__ import annotations

from collections.abc import Callable

from l2l.finetune.session import Session


def run_bare(session: Session, advance: Callable[[float], None]) -> None:
    """Run a session's remaining steps in a plain loop."""
    with session.parts.optimizer.theta.fused_steps():
        while not session.done:
            session.parts.optimizer.step(**session.arguments())
            advance(session.after_step())
