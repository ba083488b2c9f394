"""Rollcall on one machine: three Consul servers on loopback and the services, each a process of its own."""

from __future__ import annotations


class LocalError(Exception):
    """What the user is told: what was expected, what was found and what to do. Never a stack trace."""
