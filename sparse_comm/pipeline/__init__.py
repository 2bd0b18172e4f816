"""Sends between pipeline stages that carry only what the next stage reads."""

from .agreement import CODECS, Description, check_codec, compare, describe, has_messages
from .boundary import Boundary, Traffic, boundary_between
from .channels import Channels, Keep, Restore, insert, plan_channels
from .codec import Codec, Kept, MessageError
from .dense import Dense
from .ends import Ends
from .layers import Side, layers_of, read_channels, written_channels
from .message import decode, encode
from .support import Origin, set_origin
from .wire import Incoming, TorchWire, Wire, cpu_backend
from .zeros import Zeros

__all__ = [
    "CODECS",
    "Boundary",
    "Channels",
    "Codec",
    "Dense",
    "Description",
    "Ends",
    "Incoming",
    "Keep",
    "Kept",
    "MessageError",
    "Origin",
    "Restore",
    "Side",
    "TorchWire",
    "Traffic",
    "Wire",
    "Zeros",
    "boundary_between",
    "check_codec",
    "compare",
    "cpu_backend",
    "decode",
    "describe",
    "encode",
    "has_messages",
    "insert",
    "layers_of",
    "plan_channels",
    "read_channels",
    "set_origin",
    "written_channels",
]
