"""Sends between pipeline stages that carry only what the next stage reads."""

from .boundary import Boundary, Traffic
from .channels import Channels, Keep, Restore, insert, plan_channels
from .codec import Codec, Kept, MessageError
from .dense import Dense
from .layers import Side, layers_of, read_channels, written_channels
from .message import decode, encode
from .wire import TorchWire, Wire
from .zeros import Zeros

__all__ = [
    "Boundary",
    "Channels",
    "Codec",
    "Dense",
    "Keep",
    "Kept",
    "MessageError",
    "Restore",
    "Side",
    "TorchWire",
    "Traffic",
    "Wire",
    "Zeros",
    "decode",
    "encode",
    "insert",
    "layers_of",
    "plan_channels",
    "read_channels",
    "written_channels",
]
