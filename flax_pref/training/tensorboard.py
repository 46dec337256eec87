"""tensorboardX's writer of event files and its messages, without torch, which it would import where it is installed."""

import sys
from importlib import import_module

_TORCH = "torch"
_hidden = _TORCH not in sys.modules
if _hidden:
    # Its import fails, and tensorboardX does without it.
    sys.modules[_TORCH] = None  # pyright: ignore[reportArgumentType]
try:
    from tensorboardX.event_file_writer import EventsWriter

    _events, _summaries = (import_module(f"tensorboardX.proto.{name}_pb2") for name in ("event", "summary"))
finally:
    if _hidden:
        del sys.modules[_TORCH]

# Protocol buffers make their classes while they are imported.
Event, SessionLog, Summary = _events.Event, _events.SessionLog, _summaries.Summary

__all__ = ["Event", "EventsWriter", "SessionLog", "Summary"]
