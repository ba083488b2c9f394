"""How the calls of this process are treated, channel by channel; while they are open, too."""

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from rollcall.settings import CallSettings, load

_lock = threading.Lock()
_configured: dict[str, Any] = {}


class Policy:
    """The settings of one channel's calls, as they are now.

    A setting that the code has `given` stays as it is. Any other is what `configure` was told last, else what the
    environment says, else the default. Raises `BadSettingError`.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = dict(given)
        self.on_change: Callable[[], None] = lambda: None
        """Called, on some thread, after the settings have become others."""
        with _lock:
            self.settings = self._load()
            _policies.add(self)

    def agrees_with(self, other: "Policy") -> bool:
        """Say whether both treat calls alike, now and whatever is configured."""
        return (self.given, self.settings) == (other.given, other.settings)

    def _load(self) -> CallSettings:
        return load(CallSettings, overrides={**_configured, **self.given})

    def reload(self) -> None:
        """Take over what has been configured."""
        with _lock:
            before, self.settings = self.settings, self._load()
        if self.settings != before:
            self.on_change()


_policies: weakref.WeakSet[Policy] = weakref.WeakSet()


def configure(settings: Mapping[str, Any]) -> None:
    """Have these settings, valid ones, hold for all channels of the process whose code has not given others."""
    with _lock:
        _configured.clear()
        _configured.update(settings)
        policies = list(_policies)
    for policy in policies:
        policy.reload()
