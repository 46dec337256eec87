"""tensorboardX's writer of event files and its messages, without torch, which it would import where it is installed."""

import sys

_TORCH = "torch"
_hidden = _TORCH not in sys.modules
if _hidden:
    sys.modules[_TORCH] = None  # its import fails, and tensorboardX does without it
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if _hidden:
        del sys.modules[_TORCH]

__all__ = ["Event", "EventsWriter", "SessionLog", "Summary"]
